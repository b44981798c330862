//! What of a `tokenizer.json` is refused before it is given to the library that runs it: what would break that, or grow without bound.

use serde_json::{Map, Value};

/// Longest regular expression, in bytes: the longest known has under 1000.
const REGEX_BYTES_MAX: usize = 4 << 10;
/// Most objects that describe what happens to a text.
const STEPS_MAX: usize = 64;
/// How often longer a text may become before it is cut into tokens.
const GROWTH_MAX: usize = 64;
/// Longest text that is put around every other.
const AFFIX_BYTES_MAX: usize = 256;

/// Says what is wrong with the parts of a `tokenizer.json`.
pub(crate) fn check(tokenizer: &Value) -> Result<(), String> {
    let part = |name: &str| tokenizer.get(name).unwrap_or(&Value::Null);
    let mut growth = 1;
    let mut steps = 0;
    for name in ["normalizer", "pre_tokenizer"] {
        walk(part(name), &mut |step| {
            steps += 1;
            growth = usize::saturating_mul(growth, growth_of(step)?);
            if steps > STEPS_MAX || growth > GROWTH_MAX {
                return Err(format!("its {name} has too many steps, or steps that make a text too long"));
            }
            Ok(())
        })?;
    }
    for name in ["decoder", "post_processor"] {
        walk(part(name), &mut check_step)?;
    }
    walk(part("post_processor"), &mut check_template)?;
    check_merges(part("model"))?;
    let prefix = part("model").get("continuing_subword_prefix").and_then(Value::as_str);
    if prefix.is_some_and(|prefix| !prefix.is_empty()) {
        // The library cuts it off every second half of a merge, whether that has it or not.
        return Err("its model has a `continuing_subword_prefix`, which no supported model has".into());
    }
    Ok(())
}

/// The library joins both halves of a merge in a place as long as the longest token.
fn check_merges(model: &Value) -> Result<(), String> {
    let vocabulary = model.get("vocab").and_then(Value::as_object).into_iter().flatten();
    let longest = vocabulary.map(|(token, _)| token.len()).max().unwrap_or(0);
    let fits = |merge: &Value| match merge {
        // With a space in between.
        Value::String(both) => both.len() <= longest + 1,
        Value::Array(halves) => {
            halves.iter().filter_map(Value::as_str).map(str::len).sum::<usize>() <= longest
        }
        _ => true,
    };
    match model.get("merges").and_then(Value::as_array).is_none_or(|merges| merges.iter().all(fits)) {
        true => Ok(()),
        false => Err("one of its merges makes a token that the vocabulary does not have".into()),
    }
}

type Visit<'a> = &'a mut dyn FnMut(&Map<String, Value>) -> Result<(), String>;

/// Visits every object: the library tells steps apart by their members where a type is none that it knows.
fn walk(value: &Value, visit: Visit<'_>) -> Result<(), String> {
    match value {
        Value::Array(items) => items.iter().try_for_each(|item| walk(item, visit)),
        Value::Object(object) => {
            visit(object)?;
            object.values().try_for_each(|item| walk(item, visit))
        }
        _ => Ok(()),
    }
}

fn text<'v>(step: &'v Map<String, Value>, name: &str) -> &'v str {
    step.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn check_step(step: &Map<String, Value>) -> Result<(), String> {
    let kind = text(step, "type");
    let pattern = step.get("pattern").map(|pattern| (pattern.get("Regex"), pattern.get("String")));
    if let Some((Some(Value::String(regex)), _)) = pattern
        && regex.len() > REGEX_BYTES_MAX
    {
        return Err(format!("a regular expression of its {kind} has more than {REGEX_BYTES_MAX} bytes"));
    }
    if let Some((_, Some(Value::String(empty)))) = pattern
        && empty.is_empty()
    {
        return Err(format!("its {kind} looks for nothing"));
    }
    if kind == "Precompiled" && !step.get("precompiled_charsmap").is_some_and(Value::is_string) {
        return Err("its Precompiled has no `precompiled_charsmap`".into());
    }
    let affix = ["prepend", "content", "replacement"].into_iter().map(|name| text(step, name).len()).max();
    if affix.is_some_and(|bytes| bytes > AFFIX_BYTES_MAX) {
        return Err(format!("its {kind} puts in more than {AFFIX_BYTES_MAX} bytes"));
    }
    Ok(())
}

/// How often longer a step may make a text.
fn growth_of(step: &Map<String, Value>) -> Result<usize, String> {
    check_step(step)?;
    Ok(match text(step, "type") {
        "NFKC" | "NFKD" | "Nmt" | "Precompiled" => 4,
        _ if step.contains_key("content") => {
            let searched = step.get("pattern").and_then(|pattern| pattern.get("String")?.as_str());
            text(step, "content").len().div_ceil(searched.map_or(1, str::len).max(1)).max(1)
        }
        _ if step.contains_key("replacement") => 3,
        // Bytes become characters of up to two.
        _ if step.contains_key("trim_offsets") || step.contains_key("use_regex") => 2,
        "ByteLevel" => 2,
        _ => 1,
    })
}

/// A template names only tokens that it has, and one text.
fn check_template(step: &Map<String, Value>) -> Result<(), String> {
    let known = |id: &str| step.get("special_tokens").and_then(|tokens| tokens.get(id)).is_some();
    let pieces = step.get("single").and_then(Value::as_array).into_iter().flatten();
    for piece in pieces {
        let id = |kind: &str| piece.get(kind).and_then(|piece| piece.get("id")?.as_str());
        if id("SpecialToken").is_some_and(|id| !known(id)) || id("Sequence").is_some_and(|id| id != "A") {
            return Err("its TemplateProcessing names something that it does not have".into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn steps_that_break_the_library_or_flood_memory_are_refused() {
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false});
        let bad = [
            json!({"normalizer": {"type": "Precompiled"}}),
            json!({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}}),
            json!({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(200)}}),
            json!({"normalizer": {"type": "Prepend", "prepend": "a".repeat(300)}}),
            json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": vec![byte_level.clone(); 20]}}),
            json!({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a?".repeat(4000)}}}),
            json!({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}], "special_tokens": {}}}),
            json!({"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B"}}]}}),
            json!({"post_processor": {"type": "?", "single": [{"SpecialToken": {"id": "x"}}], "special_tokens": {}}}),
            json!({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}),
            json!({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}),
            json!({"model": {"type": "BPE", "continuing_subword_prefix": "##"}}),
        ];
        for tokenizer in bad {
            assert!(check(&tokenizer).is_err(), "{tokenizer}");
        }
        let good = json!({
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b", ["a", "b"]]},
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, byte_level]},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}},
                {"Sequence": {"id": "A"}}], "special_tokens": {"x": {}}},
        });
        assert_eq!(check(&good), Ok(()));
    }
}
