"""Language codes in use and the names that SeaEval's files give them."""

# code: English name, which is also the column name in SeaEval's files
LANGUAGES: dict[str, str] = {
    "en": "English", "zh": "Chinese", "vi": "Vietnamese", "es": "Spanish",
    "id": "Indonesian", "ms": "Malay", "fil": "Filipino",
    # further languages of XQuAD
    "ar": "Arabic", "de": "German", "el": "Greek", "hi": "Hindi", "ro": "Romanian", "ru": "Russian",
    "th": "Thai", "tr": "Turkish",
}
CODES: dict[str, str] = {name: code for code, name in LANGUAGES.items()}
