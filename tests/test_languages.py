"""Any language in any spelling: codes, names, requests and files."""

import subprocess
import sys

import pytest
from babel import Locale

from crossin_jax.config import Config, Data, Source, UserError
from crossin_jax.languages import (
    ENTRIES,
    LANGUAGES,
    canonical,
    canonical_list,
    find_code,
    find_files,
    is_spaced,
    match,
    name_of,
    read_ending,
    request_language,
    request_translation,
    translate_name,
)

# FLORES-200's 204 codes with ours, each looked at: a member of a macrolanguage has the code that
# people use
FLORES = """
ace_Arab:ace-Arab ace_Latn:ace acm_Arab:acm acq_Arab:acq aeb_Arab:aeb afr_Latn:af ajp_Arab:ajp
aka_Latn:ak als_Latn:sq amh_Ethi:am apc_Arab:apc arb_Arab:ar arb_Latn:ar-Latn ars_Arab:ars
ary_Arab:ary arz_Arab:arz asm_Beng:as ast_Latn:ast awa_Deva:awa ayr_Latn:ay azb_Arab:azb
azj_Latn:az bak_Cyrl:ba bam_Latn:bm ban_Latn:ban bel_Cyrl:be bem_Latn:bem ben_Beng:bn
bho_Deva:bho bjn_Arab:bjn-Arab bjn_Latn:bjn bod_Tibt:bo bos_Latn:bs bug_Latn:bug bul_Cyrl:bg
cat_Latn:ca ceb_Latn:ceb ces_Latn:cs cjk_Latn:cjk ckb_Arab:ckb crh_Latn:crh-Latn cym_Latn:cy
dan_Latn:da deu_Latn:de dik_Latn:din dyu_Latn:dyu dzo_Tibt:dz ell_Grek:el eng_Latn:en
epo_Latn:eo est_Latn:et eus_Latn:eu ewe_Latn:ee fao_Latn:fo fij_Latn:fj fin_Latn:fi fon_Latn:fon
fra_Latn:fr fur_Latn:fur fuv_Latn:fuv gaz_Latn:om gla_Latn:gd gle_Latn:ga glg_Latn:gl
grn_Latn:gn guj_Gujr:gu hat_Latn:ht hau_Latn:ha heb_Hebr:he hin_Deva:hi hne_Deva:hne hrv_Latn:hr
hun_Latn:hu hye_Armn:hy ibo_Latn:ig ilo_Latn:ilo ind_Latn:id isl_Latn:is ita_Latn:it jav_Latn:jv
jpn_Jpan:ja kab_Latn:kab kac_Latn:kac kam_Latn:kam kan_Knda:kn kas_Arab:ks kas_Deva:ks-Deva
kat_Geor:ka kaz_Cyrl:kk kbp_Latn:kbp kea_Latn:kea khk_Cyrl:mn khm_Khmr:km kik_Latn:ki
kin_Latn:rw kir_Cyrl:ky kmb_Latn:kmb kmr_Latn:ku knc_Arab:kr-Arab knc_Latn:kr kon_Latn:kg
kor_Hang:ko lao_Laoo:lo lij_Latn:lij lim_Latn:li lin_Latn:ln lit_Latn:lt lmo_Latn:lmo
ltg_Latn:ltg ltz_Latn:lb lua_Latn:lua lug_Latn:lg luo_Latn:luo lus_Latn:lus lvs_Latn:lv
mag_Deva:mag mai_Deva:mai mal_Mlym:ml mar_Deva:mr min_Arab:min-Arab min_Latn:min mkd_Cyrl:mk
mlt_Latn:mt mni_Beng:mni mos_Latn:mos mri_Latn:mi mya_Mymr:my nld_Latn:nl nno_Latn:nn
nob_Latn:nb npi_Deva:ne nso_Latn:nso nus_Latn:nus nya_Latn:ny oci_Latn:oc ory_Orya:or
pag_Latn:pag pan_Guru:pa pap_Latn:pap pbt_Arab:pbt pes_Arab:fa plt_Latn:mg pol_Latn:pl
por_Latn:pt prs_Arab:fa-AF quy_Latn:quy ron_Latn:ro run_Latn:rn rus_Cyrl:ru sag_Latn:sg
san_Deva:sa sat_Olck:sat scn_Latn:scn shn_Mymr:shn sin_Sinh:si slk_Latn:sk slv_Latn:sl
smo_Latn:sm sna_Latn:sn snd_Arab:sd som_Latn:so sot_Latn:st spa_Latn:es srd_Latn:sc srp_Cyrl:sr
ssw_Latn:ss sun_Latn:su swe_Latn:sv swh_Latn:sw szl_Latn:szl tam_Taml:ta taq_Latn:taq
taq_Tfng:taq-Tfng tat_Cyrl:tt tel_Telu:te tgk_Cyrl:tg tgl_Latn:fil tha_Thai:th tir_Ethi:ti
tpi_Latn:tpi tsn_Latn:tn tso_Latn:ts tuk_Latn:tk tum_Latn:tum tur_Latn:tr twi_Latn:tw
tzm_Tfng:tzm-Tfng uig_Arab:ug ukr_Cyrl:uk umb_Latn:umb urd_Arab:ur uzn_Latn:uz vec_Latn:vec
vie_Latn:vi war_Latn:war wol_Latn:wo xho_Latn:xh ydd_Hebr:yi yor_Latn:yo yue_Hant:yue
zho_Hans:zh zho_Hant:zh-Hant zsm_Latn:ms zul_Latn:zu
"""
# Belebele has 117 of them, without these, and five languages more in Latin letters
NOT_IN_BELEBELE = """
ace_Arab ace_Latn acq_Arab aeb_Arab ajp_Arab aka_Latn ast_Latn awa_Deva ayr_Latn azb_Arab
bak_Cyrl ban_Latn bel_Cyrl bem_Latn bho_Deva bjn_Arab bjn_Latn bos_Latn bug_Latn cjk_Latn
crh_Latn cym_Latn dik_Latn dyu_Latn dzo_Tibt epo_Latn ewe_Latn fao_Latn fij_Latn fon_Latn
fur_Latn gla_Latn gle_Latn glg_Latn hne_Deva kab_Latn kam_Latn kas_Arab kas_Deva kbp_Latn
kik_Latn kmb_Latn kmr_Latn knc_Arab knc_Latn kon_Latn lij_Latn lim_Latn lmo_Latn ltg_Latn
ltz_Latn lua_Latn lus_Latn mag_Deva mai_Deva min_Arab min_Latn mni_Beng mos_Latn nno_Latn
nus_Latn oci_Latn pag_Latn pap_Latn prs_Arab quy_Latn run_Latn sag_Latn san_Deva sat_Olck
scn_Latn smo_Latn srd_Latn szl_Latn taq_Latn taq_Tfng tat_Cyrl tpi_Latn tuk_Latn tum_Latn
twi_Latn tzm_Tfng uig_Arab umb_Latn vec_Latn ydd_Hebr yue_Hant
"""
ROMANISED = """
ben_Latn:bn-Latn hin_Latn:hi-Latn npi_Latn:ne-Latn sin_Latn:si-Latn urd_Latn:ur-Latn
"""
GLOBAL_MMLU = """
am ar bn cs de el en es fa fil fr ha he hi id ig it ja ko ky lt mg ms ne nl ny pl pt ro ru si sn so
sr sv sw te tr uk vi yo zh
"""
MMLU_PROX = "af ar bn cs de en es fr hi hu id it ja ko mr ne pt ru sr sw te th uk ur vi wo yo zh zu"
BMLAMA_53 = """
ca az en ar uk fa tr it el ru hr hi sv sq fr ga eu de nl et he es bn ms sr hy ur hu la sl cs af gl
fi ro ko cy th be id pt vi ka ja da bg zh pl lv sk lt ta ceb
"""
MMMLU = """
AR_XY:ar BN_BD:bn DE_DE:de ES_LA:es-419 FR_FR:fr HI_IN:hi ID_ID:id IT_IT:it JA_JP:ja KO_KR:ko
PT_BR:pt-BR SW_KE:sw YO_NG:yo ZH_CN:zh
"""


def pairs(table):
    return [tuple(entry.split(":")) for entry in table.split()]


@pytest.mark.parametrize(
    ("table", "count"),
    [(FLORES, 204), (ROMANISED, 5), (MMMLU, 14)],
    ids=["flores", "romanised", "mmmlu"],
)
def test_the_codes_of_data_sets(table, count):
    assert len(pairs(table)) == count
    assert {code: canonical(code) for code, _ in pairs(table)} == dict(pairs(table))


def test_no_two_languages_of_flores_or_belebele_share_a_code():
    belebele = {code for code, _ in pairs(FLORES)} - set(NOT_IN_BELEBELE.split())
    codes = {canonical(code) for code, _ in pairs(FLORES + ROMANISED)}
    assert len(codes) == 204 + len(pairs(ROMANISED))
    assert len(belebele) + len(pairs(ROMANISED)) == 122


@pytest.mark.parametrize(
    ("codes", "count"),
    [(GLOBAL_MMLU, 42), (MMLU_PROX, 29), (BMLAMA_53, 53), (" ".join(LANGUAGES), 15)],
)
def test_codes_of_two_letters_are_canonical(codes, count):
    codes = codes.split()
    assert len(codes) == count and canonical_list(codes, "") == tuple(codes)


SPELLINGS = {
    "zh": "zh, zho, chi, zh-CN, zh_Hans, zho_Hans, zh-Hans-CN, cmn, ZH, Chinese, CHINESE, "
    "Simplified Chinese, 中文, 简体中文, Mandarin",
    "zh-Hant": "zh-TW, zho_Hant, zh-Hant-TW, zh-HK, Traditional Chinese, Chinese (Traditional), "
    "繁體中文",
    "fr": "fr, fra, fre, fr-FR, fra_Latn, French, FRENCH, français, Français",
    "en": "eng, eng_Latn, en-US, en-IN, english, ENGLISH, English ",
    "pt-BR": "pt-BR, PT_BR, Brazilian Portuguese, Portuguese (Brazil)",
    "sr-Latn": "sr-Latn, srp_Latn, sh, Serbian (Latin)",
    "sr": "sr, srp, srp_Cyrl, sr-RS, Serbian, српски",
    "fil": "fil, tl, tgl, tgl_Latn, Tagalog, Filipino, fil-PH",
    "ms": "msa, zsm, may, Malay, Bahasa Melayu",
    "id": "ind, in, Indonesian, Bahasa Indonesia",
    "fa": "fas, per, pes_Arab, Persian, Farsi, فارسی",
    "fa-AF": "prs, fa-AF, Dari",
    "he": "iw, heb, Hebrew, עברית",
    "sw": "swh_Latn, swa, Kiswahili",
    "nb": "nob_Latn, nb-NO, Norwegian Bokmål",
    "no": "nor, no-NO, Norwegian",
    "ja": "jpn, ja_JP, Japanese, 日本語",
    "ko": "kor_Hang, ko-Kore, Korean, 한국어",
    "hi-Latn": "hin_Latn, Hinglish",
    "en-GB": "en-GB, British English",
}


@pytest.mark.parametrize("code", SPELLINGS)
def test_every_usual_spelling_of_a_language(code):
    for spelling in SPELLINGS[code].split(", "):
        assert canonical(spelling) == code, spelling


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        ("jp", "did you mean ja (Japanese)"),
        ("cz", "did you mean cs (Czech)"),
        ("Enlish", "did you mean en (English)"),
        ("Frnch", "did you mean fr (French)"),
        ("Sorbian", "did you mean"),  # upper or lower?
        ("Frenchy", "did you mean fr"),
        ("xx", "give a code"),
        ("zh-Xxxx", "give a code"),
        ("und", "give a code"),
        ("mul", "give a code"),
        ("", "give a code"),
        ("unknown", "give a code"),
        ("123", "give a code"),
    ],
)
def test_what_names_no_language_is_refused(value, nearest):
    with pytest.raises(UserError) as error:
        canonical(value, "data.languages")
    assert str(error.value).startswith(f"data.languages: {value!r} is not a known language")
    assert nearest in str(error.value) and find_code(value) is None


def test_a_language_named_in_two_spellings_is_named_twice():
    with pytest.raises(UserError, match="names a language twice: 'fr' and 'French' are both fr"):
        canonical_list(["en", "fr", "French"], "data.languages")


@pytest.mark.parametrize(
    ("value", "wanted", "served"),
    [
        ("French", ("en", "fr"), "fr"),
        ("en-GB", ("en", "fr"), "en"),
        ("en-GB", ("en", "en-GB"), "en-GB"),
        ("zh-TW", ("en", "zh"), "zh"),
        ("zh-TW", ("zh", "zh-Hant"), "zh-Hant"),
        ("zh", ("en", "zh-Hant"), None),
        ("ES_LA", ("en", "es"), "es"),
        ("pt", ("en", "pt-BR"), "pt-BR"),
        ("pt-PT", ("en", "pt-BR"), None),
        ("pt-PT", ("en", "pt"), "pt"),
        ("arz", ("ar",), None),
        ("de", ("en", "fr"), None),
    ],
)
def test_which_wanted_language_a_text_serves(value, wanted, served):
    assert match(value, wanted) == served


def test_a_configuration_names_languages_in_any_spelling():
    from crossin_jax.checks import check
    from crossin_jax.config import Architecture, Component, Evaluation, Model

    def make(en, fr):
        return check(
            Config(
                name="x",
                output_dir="x",
                model=Model(architecture=Architecture()),
                lora=None,
                data=Data(
                    languages=(en, fr),
                    pivot=en,
                    sources=(Source(name="a", path="a", languages=(fr,)),),
                    eval_sources=(Source(name="b", path="b", languages=(en,)),),
                    components=(Component(source="a", kind="x2x", languages={fr: 2.0}),),
                ),
                evaluation=Evaluation(languages=(fr,)),
            )
        )

    assert make("ENGLISH", "fra_Latn") == make("en", "fr")
    with pytest.raises(UserError, match=r"evaluation.languages: 'frr_' is not a known language"):
        check(Config(name="x", output_dir="x", evaluation=Evaluation(languages=("frr_",))))


def test_english_names_are_those_of_cldr_and_of_seaeval():
    assert all(Locale("en").languages[code] == name for code, name in LANGUAGES.items())
    names = {"fr": "French", "sr-Latn": "Serbian (Latin)", "acq": "Ta'izzi-Adeni Arabic"}
    assert {code: name_of(code) for code in names} == names
    assert (
        name_of("zh-Hant") == "Traditional Chinese" and name_of("pt-BR") == "Brazilian Portuguese"
    )
    assert name_of("Chinese") == "Chinese" and name_of("all") != "all" and name_of("zz") == "zz"


@pytest.mark.parametrize(
    ("prompt", "answer", "sentence"),
    [
        ("fr", "ja", "Réponds en japonais."),
        ("ja", "fr", "フランス語で答えてください。"),
        ("de", "zh", "Antworte auf Chinesisch."),
        ("zh", "ar", "请用阿拉伯语回答。"),
        ("zh-Hant", "en", "請用英文回答。"),
        ("pt-BR", "de", "Responda em alemão."),
        ("ru", "sw", "Язык ответа: суахили."),
        ("sr-Latn", "fr", "Jezik odgovora: francuski."),
        ("el", "en", "Απάντησε στα αγγλικά."),
        ("lt", "en", "Atsakyk anglų kalba."),
        ("vi", "ja", "Hãy trả lời bằng tiếng Nhật."),
        ("ny", "en", "Yankhani mu Chingerezi."),
    ],
)
def test_a_request_is_in_the_language_of_the_prompt(prompt, answer, sentence):
    assert request_language(prompt, answer) == (sentence, True)


def test_requests_are_curated_for_sixty_languages_with_global_mmlu_and_todays():
    codes = sorted(code for code, entry in ENTRIES.items() if entry.request)
    assert {*GLOBAL_MMLU.split(), *LANGUAGES} <= {*codes} and len(codes) == 60  # see docs/data.md
    for code in codes:
        assert request_language(code, "en")[1] and request_language(code, code)[1], code
        assert ENTRIES[code].request.count("{}") == 1
        assert code == "en" or ENTRIES[code].translation.count("{}") == 1
        assert code == "en" or request_translation(code, "en")
    sentences = {(a, b): request_language(a, b)[0] for a in codes for b in codes}
    for a in codes:  # a request names one language, so each of a language's sentences differs
        assert len({sentences[a, b] for b in codes}) == len(codes), a


@pytest.mark.parametrize(
    ("prompt", "answer"), [("xh", "fr"), ("acq", "zh"), ("mg", "xh"), ("fr", "acq")]
)
def test_elsewhere_the_request_is_in_english(prompt, answer):
    assert request_language(prompt, answer) == (f"Answer in {name_of(answer)}.", False)
    assert translate_name("fr", "acq") is None


def test_which_languages_put_spaces_between_words():
    assert [c for c in (*LANGUAGES, "ja", "km", "ko", "zh-Hant", "en") if not is_spaced(c)] == [
        "zh",
        "th",
        "ja",
        "km",
        "zh-Hant",
    ]


def test_files_have_their_language_in_any_spelling(tmp_path):
    for name in ("a.fra_Latn.json", "a.English.json", "a.ZH-CN.json", "a.zh.json", "a.final.json"):
        (tmp_path / name).touch()
    (tmp_path / "de").mkdir()
    (tmp_path / "de" / "x_de.json").touch()
    (tmp_path / "de" / "x_fr.json").touch()
    found = find_files(f"{tmp_path}/a.{{lang}}.json", ["en", "fr", "zh", "es"])
    names = {code: [path.name for path in paths] for code, paths in found.items()}
    # a file with the code itself goes before other spellings
    assert names == {
        "en": ["a.English.json"],
        "fr": ["a.fra_Latn.json"],
        "zh": ["a.zh.json"],
        "es": [],
    }
    folder = find_files(str(tmp_path), ["en", "fr", "zh", "de"], [".json"])
    assert {code: [path.name for path in paths] for code, paths in folder.items()} == {
        "en": ["a.English.json"],
        "fr": ["a.fra_Latn.json"],
        "zh": ["a.zh.json"],
        "de": [],
    }
    twice = find_files(f"{tmp_path}/{{lang}}/x_{{lang}}.json", ["de", "fr"])
    assert [path.name for path in twice["de"]] == ["x_de.json"] and twice["fr"] == []


@pytest.mark.parametrize(
    ("stem", "code"),
    [
        ("mmlu_ZH-CN", "zh"),
        ("mmlu_PT-BR", "pt-BR"),  # BR alone is Breton, and LA Latin
        ("mmlu_ES-LA", "es-419"),
        ("dev.zho_Hant", "zh-Hant"),
        ("alpaca-en", "en"),
        ("global_mmlu_French", "fr"),
        ("x_Simplified Chinese", "zh"),
        ("npi_Latn", "ne-Latn"),
        ("train", None),
        ("cross_mmlu", None),
    ],
)
def test_the_language_at_the_end_of_a_name(stem, code):
    assert read_ending(stem) == code


def test_the_libraries_are_opened_only_for_languages_outside_the_table():
    """`train` starts as fast as before: neither langcodes nor Babel is imported for the languages
    of the table.
    """
    code = (
        "import sys; from crossin_jax.languages import *; canonical_list(['English', 'zh', "
        "'fil'], '');"
        "assert name_of('ar') == 'Arabic' and match('Spanish', ['es']) == 'es';"
        "assert not {'langcodes', 'language_data', 'babel'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_entry_has_only_lines_that_the_table_explains():
    """A wrong field is refused when the table is read; names replace those of CLDR and nothing
    else.
    """
    for code, entry in ENTRIES.items():
        assert canonical(code) == code and entry.code == code
        assert {canonical(name) for name in entry.names} == set(entry.names)
        for other, name in entry.names.items():
            assert translate_name(other, code) != name, (code, other)


def test_a_setting_that_came_later_is_in_a_stored_configuration_only_where_it_is_set():
    from crossin_jax.config import Component, from_dict, to_dict

    usual, changed = Component(kind="trans"), Component(kind="trans", request="prompt")
    assert "request" not in to_dict(usual) and to_dict(changed)["request"] == "prompt"
    assert [from_dict(to_dict(each), Component) for each in (usual, changed)] == [usual, changed]
