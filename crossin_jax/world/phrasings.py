"""How the facts of the embedded world are stated and asked in seven languages: phrasings.json.

An entry per language:

- `tell`: by relation, statements for pretraining. {e} is the entity and {a} the answer, always in
  this order, so that a causal model learns to go from the entity to the answer.
- `ask`: by relation, instructions. Phrasing k says the same thing in every language.
- `articles`: an article, and a pattern of the territories' names that take it.
- `language_form`: how an answer writes the name of a language. CLDR's bare "Prancis" is also
  the name of the country; a native speaker answers "bahasa Prancis".

Chinese has a space between a name and the Han characters beside it. A reader does not need it, but
a byte-level BPE does: it cuts words only at spaces and punctuation. Without the space, a name would
be split into other tokens in a sentence than in the dictionary lines, and a model of a million
parameters could not see that both are one name.

Spanish avoids articles before currencies (their gender varies) and verbs that agree with the
territory (some names are plurals). No Spanish sentence begins with the territory, so its article is
never capitalised.
"""

import json
import re
from pathlib import Path
from typing import Any

_PHRASINGS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
TELL = {code: entry["tell"] for code, entry in _PHRASINGS.items()}
ASK = {code: entry["ask"] for code, entry in _PHRASINGS.items()}
LANGUAGE_FORM = {code: entry.get("language_form", "{}") for code, entry in _PHRASINGS.items()}


def with_article(name: str, language: str) -> str:
    """A name as it is used in a sentence: the United States, las Islas Cook, Francia."""
    for article, pattern in _PHRASINGS[language].get("articles", {}).items():
        if re.search(pattern, name):
            return f"{article} {name}"
    return name


def join(phrasing: str, **names: str) -> str:
    """The phrasing with its names; Spanish "de el" becomes "del"."""
    return phrasing.format(**names).replace(" de el ", " del ")
