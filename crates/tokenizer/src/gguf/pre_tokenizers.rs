//! The pre-tokenizers that `tokenizer.ggml.pre` names: how a text is cut into words before pairs are merged.
//!
//! The patterns are those of the models' own `tokenizer.json`, in order: each cuts what the ones before it left.
//! Names and groups follow llama.cpp; names that it computes by other means than patterns are not known here.

/// One way to cut, with what llama.cpp ties to its name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PreTokenizer {
    /// Values of `tokenizer.ggml.pre`; the first is the one to export.
    pub(crate) names: &'static [&'static str],
    pub(crate) patterns: &'static [&'static str],
    /// A word that is a token is taken whole, whatever the merges say.
    pub(crate) ignore_merges: bool,
    /// Whether the beginning-of-sequence token is added where the file does not say.
    pub(crate) add_bos: bool,
    /// Whether the models of this name normalise text to NFC. (llama.cpp does not, the models' own tokenizers do.)
    pub(crate) nfc: bool,
}

/// Cuts as GPT-2 does; this is also what `ByteLevel` with its own pattern means.
pub(crate) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Cuts digits off one by one; this is also what `Digits` means.
pub(crate) const SINGLE_DIGITS: &str = r"\p{N}";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
/// Letters of the scripts that DeepSeek's first tokenizer lists one by one.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿ",
    r"ᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨ",
    r"K-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀",
    r"-𐳲𑢠-𑣟𞤀-𞥃]+",
);

const fn plain(names: &'static [&'static str], patterns: &'static [&'static str]) -> PreTokenizer {
    PreTokenizer { names, patterns, ignore_merges: false, add_bos: false, nfc: false }
}

const KNOWN: &[PreTokenizer] = &[
    PreTokenizer { nfc: true, ..plain(&["qwen2", "megrez"], &[QWEN2]) },
    plain(
        &["deepseek-r1-qwen", "stablelm2", "hunyuan", "solar-open", "grok-2", "kormo", "f2llmv2"],
        &[QWEN2],
    ),
    PreTokenizer { nfc: true, ..plain(&["qwen35"], &[QWEN35]) },
    PreTokenizer {
        ignore_merges: true,
        add_bos: true,
        ..plain(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
            &[LLAMA3],
        )
    },
    plain(&["smaug-bpe", "dbrx", "chatglm-bpe"], &[LLAMA3]),
    PreTokenizer { ignore_merges: true, ..plain(&["glm4", "glm5"], &[LLAMA3]) },
    plain(
        &[
            "gpt-2",
            "phi-2",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
        ],
        &[GPT2],
    ),
    PreTokenizer { nfc: true, ..plain(&["olmo", "mpt"], &[GPT2]) },
    plain(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[SINGLE_DIGITS, GPT2],
    ),
    PreTokenizer { ignore_merges: true, add_bos: true, ..plain(&["tekken", "mistral-nemo"], &[TEKKEN]) },
    plain(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT4O]),
    plain(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3],
    ),
    plain(
        &["deepseek-llm"],
        &[
            r"[\r\n]",
            DEEPSEEK_LETTERS,
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            r"[一-龥ࠀ-一가-\u{d7ff}]+",
            r"\p{N}+",
        ],
    ),
    plain(
        &["deepseek-coder"],
        &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-\u{d7ff}]+", SINGLE_DIGITS],
    ),
    plain(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    plain(&["seed-coder"], &[SEED_CODER]),
    plain(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    plain(&["bloom", "gpt3-finnish", "poro-chat"], &[BLOOM]),
    plain(&["viking"], &[BLOOM, SINGLE_DIGITS]),
    plain(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
];

/// The pre-tokenizer of a name. A file without a name is cut as `default`, as llama.cpp does.
pub(crate) fn by_name(name: Option<&str>) -> Option<&'static PreTokenizer> {
    let name = name.filter(|name| !name.is_empty()).unwrap_or("default");
    KNOWN.iter().find(|known| known.names.contains(&name))
}

/// Every name, for messages.
pub(crate) fn names() -> String {
    let all: Vec<&str> = KNOWN.iter().flat_map(|known| known.names.iter().copied()).collect();
    all.join(", ")
}

/// The pre-tokenizer that cuts so and treats merges so. One that also normalises so is preferred.
pub(crate) fn by_patterns(
    patterns: &[&str],
    ignore_merges: bool,
    nfc: bool,
) -> Option<&'static PreTokenizer> {
    let fits = |known: &&PreTokenizer| known.patterns == patterns && known.ignore_merges == ignore_merges;
    KNOWN.iter().filter(fits).find(|known| known.nfc == nfc).or_else(|| KNOWN.iter().find(fits))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokenizers::SplitDelimiterBehavior::Isolated;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

    #[test]
    fn every_name_is_there_once_and_every_pattern_compiles() {
        let mut seen = std::collections::HashSet::new();
        for known in KNOWN {
            assert!(known.names.iter().all(|name| seen.insert(name)), "{:?} twice", known.names);
            for pattern in known.patterns {
                Split::new(SplitPattern::Regex((*pattern).into()), Isolated, false).unwrap();
            }
        }
    }

    #[test]
    fn names_lead_to_patterns_and_back() {
        let found = by_patterns(&[GPT2], false, true).unwrap();
        assert_eq!(found.names[0], "olmo");
        assert_eq!(by_patterns(&[LLAMA3], true, false).unwrap().names[0], "llama-bpe");
        assert_eq!(by_patterns(&[LLAMA3], true, true).unwrap().names[0], "llama-bpe");
        assert_eq!(by_name(None), by_name(Some("default")));
        assert_eq!(by_name(Some("kimi-k2")), None);
        assert!(names().contains("qwen2"));
    }
}
