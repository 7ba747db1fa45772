"""How the facts of the embedded world are said and asked in seven languages.

`TELL[language][relation]`: statements for pretraining; {e} is the entity, {a} the answer, always in this order, so that
a causal model learns to go from the entity to the answer. `ASK[language][relation]`: instructions. Phrasing k says the
same thing in every language.

Chinese has a space between a name and the Han characters beside it. Readers do without, a byte-level BPE does not: it
cuts words at spaces and punctuation only, so without the space a name would melt into its sentence and have other
tokens there than in the dictionary lines, and a model of a million parameters could not see that they are one name.

Spanish avoids articles before currencies (their gender varies) and verbs that agree with the territory (some names are
plurals); no Spanish sentence begins with the territory, so its article stays small.
"""

import re

# CLDR's bare language names ("Prancis" is the country too) in the form a native answers with
LANGUAGE_FORM: dict[str, str] = {"id": "bahasa {}", "ms": "bahasa {}"}

_ARTICLES: dict[str, tuple[tuple[str, re.Pattern], ...]] = {
    "en": (("the", re.compile(r"^(United |Isle of )|(Islands|Territor(y|ies)|Republic|Netherlands|Philippines|Bahamas"
                              r"|Maldives|Comoros|Gambia|Americas)$")),),
    "es": (("las", re.compile(r"^(Islas|Bahamas|Bermudas|Comoras|Maldivas)\b")),
           ("la", re.compile(r"^(Ciudad|Isla|República|RAE)\b")),
           ("los", re.compile(r"^(Emiratos|Países|Territorios)\b")),
           ("el", re.compile(r"^(Caribe|Reino|Territorio)\b"))),
}


def with_article(name: str, language: str) -> str:
    """A name as it stands in a sentence of its language: the United States, las Islas Cook, Francia."""
    return next((f"{article} {name}" for article, names in _ARTICLES.get(language, ()) if names.search(name)), name)


def join(phrasing: str, **names: str) -> str:
    """The phrasing with its names; Spanish "de el" becomes "del"."""
    return phrasing.format(**names).replace(" de el ", " del ")


TELL: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "currency": ("The currency of {e} is the {a}.", "In {e}, people pay with the {a}.",
                     "The currency used in {e} is the {a}."),
        "language": ("The main official language of {e} is {a}.", "In {e}, the main official language is {a}.",
                     "An official language of {e} is {a}."),
        "time_zone": ("The time zone of {e} is {a}.", "In {e}, clocks are set to {a}.",
                      "The time zone used in {e} is {a}."),
        "continent": ("The continent of {e} is {a}.", "The territory of {e} lies in {a}.",
                      "On the map, {e} is found in {a}."),
    },
    "zh": {
        "currency": ("{e} 的货币是 {a}。", "在 {e}，人们用 {a} 付款。", "{e} 使用的货币是 {a}。"),
        "language": ("{e} 的主要官方语言是 {a}。", "在 {e}，主要的官方语言是 {a}。", "{e} 的一种官方语言是 {a}。"),
        "time_zone": ("{e} 的时区是 {a}。", "在 {e}，时钟按 {a} 校准。", "{e} 使用的时区是 {a}。"),
        "continent": ("{e} 所在的大洲是 {a}。", "{e} 的领土位于 {a}。", "在地图上，{e} 位于 {a}。"),
    },
    "vi": {
        "currency": ("Đơn vị tiền tệ của {e} là {a}.", "Ở {e}, người ta trả bằng {a}.",
                     "Đồng tiền được sử dụng ở {e} là {a}."),
        "language": ("Ngôn ngữ chính thức chủ yếu của {e} là {a}.", "Ở {e}, ngôn ngữ chính thức chủ yếu là {a}.",
                     "Một ngôn ngữ chính thức của {e} là {a}."),
        "time_zone": ("Múi giờ của {e} là {a}.", "Ở {e}, đồng hồ được chỉnh theo {a}.",
                      "Múi giờ được sử dụng ở {e} là {a}."),
        "continent": ("Châu lục của {e} là {a}.", "Lãnh thổ của {e} nằm ở {a}.", "Trên bản đồ, {e} nằm ở {a}."),
    },
    "es": {
        "currency": ("La moneda de {e} se llama {a}.", "En {e} se paga con la moneda llamada {a}.",
                     "La moneda que se usa en {e} se llama {a}."),
        "language": ("El principal idioma oficial de {e} es el {a}.", "En {e}, el principal idioma oficial es el {a}.",
                     "Un idioma oficial de {e} es el {a}."),
        "time_zone": ("La zona horaria de {e} es la {a}.", "En {e}, los relojes marcan la {a}.",
                      "La zona horaria que se usa en {e} es la {a}."),
        "continent": ("El continente de {e} es {a}.", "El territorio de {e} está en {a}.",
                      "En el mapa, el territorio de {e} aparece en {a}."),
    },
    "id": {
        "currency": ("Mata uang {e} adalah {a}.", "Di {e}, orang membayar dengan {a}.",
                     "Mata uang yang digunakan di {e} adalah {a}."),
        "language": ("Bahasa resmi utama {e} adalah {a}.", "Di {e}, bahasa resmi utamanya adalah {a}.",
                     "Salah satu bahasa resmi {e} adalah {a}."),
        "time_zone": ("Zona waktu {e} adalah {a}.", "Di {e}, jam disetel menurut {a}.",
                      "Zona waktu yang digunakan di {e} adalah {a}."),
        "continent": ("Benua tempat {e} berada adalah {a}.", "Wilayah {e} terletak di {a}.",
                      "Di peta, {e} berada di {a}."),
    },
    "ms": {
        "currency": ("Mata wang {e} ialah {a}.", "Di {e}, orang membayar dengan {a}.",
                     "Mata wang yang digunakan di {e} ialah {a}."),
        "language": ("Bahasa rasmi utama {e} ialah {a}.", "Di {e}, bahasa rasmi utamanya ialah {a}.",
                     "Salah satu bahasa rasmi {e} ialah {a}."),
        "time_zone": ("Zon waktu {e} ialah {a}.", "Di {e}, jam ditetapkan mengikut {a}.",
                      "Zon waktu yang digunakan di {e} ialah {a}."),
        "continent": ("Benua tempat {e} terletak ialah {a}.", "Wilayah {e} terletak di {a}.",
                      "Pada peta, {e} berada di {a}."),
    },
    "fil": {
        "currency": ("Ang pera ng {e} ay {a}.", "Sa {e}, nagbabayad ang mga tao gamit ang {a}.",
                     "Ang perang ginagamit sa {e} ay {a}."),
        "language": ("Ang pangunahing opisyal na wika ng {e} ay {a}.",
                     "Sa {e}, ang pangunahing opisyal na wika ay {a}.", "Isang opisyal na wika ng {e} ang {a}."),
        "time_zone": ("Ang time zone ng {e} ay {a}.", "Sa {e}, nakatakda ang mga orasan sa {a}.",
                      "Ang time zone na ginagamit sa {e} ay {a}."),
        "continent": ("Ang kontinente ng {e} ay {a}.", "Ang teritoryo ng {e} ay nasa {a}.",
                      "Sa mapa, makikita ang {e} sa {a}."),
    },
}

ASK: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "currency": ("What is the currency of {e}?", "Which currency is used in {e}?", "Name the currency of {e}.",
                     "What money do people pay with in {e}?"),
        "language": ("What is the main official language of {e}?", "Which language is official in {e}?",
                     "Name the main official language of {e}.", "Which official language do people speak in {e}?"),
        "time_zone": ("What is the time zone of {e}?", "Which time zone is used in {e}?", "Name the time zone of {e}.",
                      "Which time do people set their clocks to in {e}?"),
        "continent": ("Which continent does {e} belong to?", "On which continent does the territory of {e} lie?",
                      "Name the continent of {e}.", "In which part of the world is the territory of {e}?"),
    },
    "zh": {
        "currency": ("{e} 的货币是什么？", "{e} 使用哪种货币？", "请说出 {e} 的货币。", "人们在 {e} 用什么钱付款？"),
        "language": ("{e} 的主要官方语言是什么？", "{e} 的官方语言是哪一种？", "请说出 {e} 的主要官方语言。",
                     "人们在 {e} 说哪种官方语言？"),
        "time_zone": ("{e} 的时区是什么？", "{e} 使用哪个时区？", "请说出 {e} 的时区。",
                      "人们在 {e} 按什么时间校准时钟？"),
        "continent": ("{e} 属于哪个大洲？", "{e} 的领土位于哪个大洲？", "请说出 {e} 所在的大洲。",
                      "{e} 的领土在世界的哪个部分？"),
    },
    "vi": {
        "currency": ("Đơn vị tiền tệ của {e} là gì?", "Loại tiền tệ nào được sử dụng ở {e}?",
                     "Hãy cho biết đơn vị tiền tệ của {e}.", "Người ta trả bằng tiền gì ở {e}?"),
        "language": ("Ngôn ngữ chính thức chủ yếu của {e} là gì?", "Ngôn ngữ nào là ngôn ngữ chính thức ở {e}?",
                     "Hãy cho biết ngôn ngữ chính thức chủ yếu của {e}.",
                     "Người dân nói ngôn ngữ chính thức nào ở {e}?"),
        "time_zone": ("Múi giờ của {e} là gì?", "Múi giờ nào được sử dụng ở {e}?", "Hãy cho biết múi giờ của {e}.",
                      "Người ta chỉnh đồng hồ theo giờ nào ở {e}?"),
        "continent": ("{e} thuộc châu lục nào?", "Lãnh thổ của {e} nằm ở châu lục nào?",
                      "Hãy cho biết châu lục của {e}.", "Lãnh thổ của {e} nằm ở phần nào của thế giới?"),
    },
    "es": {
        "currency": ("¿Cuál es la moneda de {e}?", "¿Qué moneda se usa en {e}?", "Nombra la moneda de {e}.",
                     "¿Con qué dinero paga la gente en {e}?"),
        "language": ("¿Cuál es el principal idioma oficial de {e}?", "¿Qué idioma es oficial en {e}?",
                     "Nombra el principal idioma oficial de {e}.", "¿Qué idioma oficial habla la gente en {e}?"),
        "time_zone": ("¿Cuál es la zona horaria de {e}?", "¿Qué zona horaria se usa en {e}?",
                      "Nombra la zona horaria de {e}.", "¿Según qué hora pone la gente el reloj en {e}?"),
        "continent": ("¿Cuál es el continente de {e}?", "¿En qué continente está el territorio de {e}?",
                      "Nombra el continente de {e}.", "¿En qué parte del mundo está el territorio de {e}?"),
    },
    "id": {
        "currency": ("Apa mata uang {e}?", "Mata uang apa yang digunakan di {e}?", "Sebutkan mata uang {e}.",
                     "Dengan uang apa orang membayar di {e}?"),
        "language": ("Apa bahasa resmi utama {e}?", "Bahasa apa yang menjadi bahasa resmi di {e}?",
                     "Sebutkan bahasa resmi utama {e}.", "Bahasa resmi apa yang dituturkan orang di {e}?"),
        "time_zone": ("Apa zona waktu {e}?", "Zona waktu mana yang digunakan di {e}?", "Sebutkan zona waktu {e}.",
                      "Menurut waktu apa orang menyetel jam di {e}?"),
        "continent": ("{e} termasuk benua mana?", "Di benua mana wilayah {e} terletak?",
                      "Sebutkan benua tempat {e} berada.", "Di bagian dunia mana wilayah {e} berada?"),
    },
    "ms": {
        "currency": ("Apakah mata wang {e}?", "Mata wang apakah yang digunakan di {e}?", "Namakan mata wang {e}.",
                     "Dengan wang apakah orang membayar di {e}?"),
        "language": ("Apakah bahasa rasmi utama {e}?", "Bahasa apakah yang menjadi bahasa rasmi di {e}?",
                     "Namakan bahasa rasmi utama {e}.", "Bahasa rasmi apakah yang dituturkan orang di {e}?"),
        "time_zone": ("Apakah zon waktu {e}?", "Zon waktu manakah yang digunakan di {e}?", "Namakan zon waktu {e}.",
                      "Mengikut waktu apakah orang menetapkan jam di {e}?"),
        "continent": ("{e} termasuk dalam benua manakah?", "Di benua manakah wilayah {e} terletak?",
                      "Namakan benua tempat {e} terletak.", "Di bahagian dunia manakah wilayah {e} berada?"),
    },
    "fil": {
        "currency": ("Ano ang pera ng {e}?", "Anong pera ang ginagamit sa {e}?", "Sabihin kung ano ang pera ng {e}.",
                     "Anong pera ang ipinambabayad ng mga tao sa {e}?"),
        "language": ("Ano ang pangunahing opisyal na wika ng {e}?", "Anong wika ang opisyal sa {e}?",
                     "Sabihin kung ano ang pangunahing opisyal na wika ng {e}.",
                     "Anong opisyal na wika ang sinasalita ng mga tao sa {e}?"),
        "time_zone": ("Ano ang time zone ng {e}?", "Anong time zone ang ginagamit sa {e}?",
                      "Sabihin kung ano ang time zone ng {e}.",
                      "Sa anong oras itinatakda ng mga tao ang mga orasan sa {e}?"),
        "continent": ("Sa anong kontinente kabilang ang {e}?", "Sa anong kontinente naroon ang teritoryo ng {e}?",
                      "Sabihin kung ano ang kontinente ng {e}.",
                      "Sa anong bahagi ng mundo naroon ang teritoryo ng {e}?"),
    },
}
