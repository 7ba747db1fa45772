"""Which language a text is in, told by script, letters and function words; no model, no download.

Meant for audits and for the off-target rate of answers: a text without evidence gets None, never a guess.
"""

import re
from collections.abc import Sequence

# Scripts that name one language of ours
SCRIPTS: dict[str, re.Pattern] = {
    code: re.compile(f"[{letters}]") for code, letters in {
        "zh": "\u3400-\u9fff", "ar": "\u0600-\u06ff", "el": "\u0370-\u03ff", "hi": "\u0900-\u097f",
        "ru": "\u0400-\u04ff", "th": "\u0e00-\u0e7f"}.items()
}
LATIN = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
# Letters that one of the Latin-script languages has and the others hardly use
LETTERS: dict[str, str] = {"vi": "ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ", "es": "ñ¿¡", "de": "ßäö",
                           "ro": "ășțâş", "tr": "ğış"}
WORDS: dict[str, str] = {
    "en": "the of and to in is that for it was on are as with by at from this be or an have which not were has what "
          "who how when if their its you can will would there does did been his her they we your following answer",
    "vi": "của và là các được có trong cho với không một những người này khi đã từ như để tại về theo nào gì đó ông "
          "nếu hay bị vào ra năm nhiều trên sau thì việc câu sự",
    "es": "de la que el en los se del las por con una para es su al lo como más pero sus le este entre cuando qué "
          "sobre también hasta donde quien desde fue son está si un y cuál según",
    "id": "yang dan di dengan untuk pada dalam adalah ini itu tidak akan oleh sebagai juga atau ada telah kepada "
          "seorang apa tersebut jika mereka dari bahwa karena bisa saat ketika sebuah beberapa namun sedangkan "
          "yaitu maupun harus dapat memiliki hal jawaban pertanyaan pernyataan pemerintah perusahaan kelompok pria "
          "mobil uang kota kantor berbeda butuh membutuhkan terjadi selama lainnya universitas penelitian disebut "
          "bagian peneliti mengalami siswa dokter saja ingin tergantung produksi situs mahasiswa sebesar kamu "
          "bagaimana karyawan kualitas aktivitas umumnya teori berdasarkan informasi paragraf argumen akurat logis "
          "bacaan penulis alasan",
    "ms": "yang dan di dengan untuk pada dalam adalah ini itu tidak akan oleh sebagai juga atau ada telah kepada "
          "seorang apa tersebut jika mereka daripada kerana bahawa boleh semasa apabila ialah tetapi iaitu bagi "
          "manakala mesti mempunyai perkara jawapan soalan kenyataan kerajaan syarikat kumpulan lelaki kereta wang "
          "bandar pejabat berbeza universiti kajian dipanggil bahagian penyelidik polis pelajar doktor sahaja mahu "
          "bergantung pengeluaran awak kualiti aktiviti undang kanak penyelidikan dijalankan selepas antara satukah "
          "mengikut maklumat hujah petikan perenggan logik betul andaian pengarang kandungan seterusnya disebabkan",
    "fil": "ang ng sa na mga ay at ito hindi kung para siya may ni niya mula nang isang kay ko ka mo lamang kanyang "
          "sino ano alin saan paano dahil upang sila kanilang pero o bilang alinman sumusunod ba anong noong",
    "de": "der die und das ist nicht ein eine von mit den dem zu auf für im als auch es an werden aus er hat dass "
          "sie nach wird bei wurde sich einer des wie was oder um über",
    "ro": "de și în la cu pe din care este nu o un pentru mai ce se fi a au fost prin sau ca al ale lui într sunt "
          "dintre după cel cea câte unde",
    "tr": "ve bir bu için ile olarak da de çok daha ne olan en gibi ise sonra kadar olduğu hangi kim nasıl var ya "
          "değil tarafından göre her nedir nerede mi",
}
_WORD_SETS = {code: frozenset(words.split()) for code, words in WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+")


def identify(text: str, candidates: Sequence[str]) -> str | None:
    """The likeliest of the candidate codes, or None where the text gives no evidence (numbers, names, few words).

    Scripts decide first, then letters and function words. Indonesian and Malay differ in few words; a text without any
    of them counts as the first of the two among the candidates.
    """
    counts = {code: len(pattern.findall(text)) for code, pattern in SCRIPTS.items()}
    script, letters = max(counts, key=counts.get), len(LATIN.findall(text))
    # a Han character says about as much as three letters
    if counts[script] * (3 if script == "zh" else 1) > letters:
        return script if script in candidates else None
    scores = score_words(text, candidates)
    if not scores:
        return None
    best = max(scores.values())
    return next((code for code in candidates if scores.get(code) == best), None) if best > 0 else None


def score_words(text: str, candidates: Sequence[str]) -> dict[str, float]:
    """Evidence for each Latin-script candidate: its function words, and letters that are its own."""
    words = _WORD.findall(text.lower())
    scores = {}
    for code in candidates:
        if code in _WORD_SETS:
            own = sum(text.lower().count(letter) for letter in LETTERS.get(code, ""))
            scores[code] = sum(word in _WORD_SETS[code] for word in words) + 1.5 * own
    return scores
