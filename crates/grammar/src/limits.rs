//! What a client's grammar may cost, checked before anything is compiled.
//!
//! The compiler's own fuel covers regular expressions and the parse, but not the merging of `allOf` with `anyOf`,
//! whose result can be exponentially larger than the schema. Here the merging is walked with a budget instead.

use crate::compiler::GrammarError;
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};

/// Most choices that one schema may leave open at once: each multiplies the combinations.
const CHOICES_MAX: usize = 64;
/// Longest source of a grammar.
pub(crate) const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Deepest nesting of brackets in a source.
pub(crate) const DEPTH_MAX: usize = 64;
/// Schemas visited, counting each alternative that merging creates.
const EXPANSION_MAX: usize = 20_000;
/// Largest number of items or properties in a bound.
const COUNT_MAX: usize = 10_000;
/// Largest length of a string in a bound; repetition is unfolded only as far as an answer goes.
const LENGTH_MAX: usize = 1_000_000;
/// Longest regular expression; compiling one takes time quadratic in its length.
const PATTERN_BYTES_MAX: usize = 4 << 10;
/// Longest Lark source without its schemas, for the same reason.
const LARK_BYTES_MAX: usize = 32 << 10;
/// Largest step between the multiples that a schema allows, in units of its last decimal place: an automaton counts through it.
const STEP_MAX: u64 = 10_000;
/// Most decimal places of a step.
const DECIMALS_MAX: u32 = 6;
/// The same of all steps of a schema taken together: where they are merged, their least common multiple is counted through.
const STEPS_MAX: u64 = 100_000;
/// Most values in one `enum`.
const ENUM_MAX: usize = 5_000;

/// Refuses sources whose brackets nest too deeply for a recursive parser. `quotes` are the characters that quote.
pub(crate) fn check_source(source: &str, quotes: &[char]) -> Result<(), GrammarError> {
    if source.len() > SOURCE_BYTES_MAX {
        return Err(GrammarError::TooLarge { what: "source in bytes", limit: SOURCE_BYTES_MAX });
    }
    let mut depth = 0usize;
    let mut quoted_by = None;
    let mut chars = source.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' if quoted_by.is_some() => {
                chars.next();
            }
            c if quoted_by == Some(c) => quoted_by = None,
            // A quote ends at the line's end in Lark, and may not be closed at all in broken input.
            '\n' => quoted_by = None,
            _ if quoted_by.is_some() => {}
            c if quotes.contains(&c) => quoted_by = Some(c),
            '{' | '[' | '(' => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return Err(GrammarError::TooLarge { what: "nesting", limit: DEPTH_MAX });
                }
            }
            '}' | ']' | ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// Checks a Lark grammar and the schemas written in it after `%json`.
pub(crate) fn check_lark(source: &str) -> Result<(), GrammarError> {
    check_source(source, &['"', '/'])?;
    let mut schema_bytes = 0;
    for (at, keyword) in source.match_indices("%json") {
        let rest = &source[at + keyword.len()..];
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        if let Some(Ok(schema)) = values.next() {
            schema_bytes += values.byte_offset();
            check_schema(&schema)?;
        }
    }
    if source.len().saturating_sub(schema_bytes) > LARK_BYTES_MAX {
        return Err(GrammarError::TooLarge {
            what: "Lark source in bytes, without schemas",
            limit: LARK_BYTES_MAX,
        });
    }
    Ok(())
}

/// Refuses schemas whose merged form is too large. The schema has been parsed, so its depth is bounded.
pub(crate) fn check_schema(schema: &Value) -> Result<(), GrammarError> {
    check_values(schema)?;
    check_steps(schema)?;
    let mut walk = Walk { root: schema, budget: EXPANSION_MAX, seen: HashSet::new(), pending: vec![schema] };
    while let Some(next) = walk.pending.pop() {
        walk.visit(vec![next], 0)?;
    }
    Ok(())
}

/// Bounds on single keywords, wherever they stand.
fn check_values(value: &Value) -> Result<(), GrammarError> {
    match value {
        Value::Array(items) => items.iter().try_for_each(check_values),
        Value::Object(object) => {
            for (key, item) in object {
                let (what, limit) = match key.as_str() {
                    "minItems" | "maxItems" | "minProperties" | "maxProperties" => {
                        ("number of items", COUNT_MAX)
                    }
                    "minLength" | "maxLength" => ("length of strings", LENGTH_MAX),
                    _ => ("", usize::MAX),
                };
                if item.as_f64().is_some_and(|bound| bound > limit as f64) {
                    return Err(GrammarError::TooLarge { what, limit });
                }
                let pattern = match (key.as_str(), item) {
                    ("pattern", Value::String(pattern)) => pattern.len(),
                    ("patternProperties", Value::Object(named)) => {
                        named.keys().map(String::len).max().unwrap_or(0)
                    }
                    _ => 0,
                };
                if pattern > PATTERN_BYTES_MAX {
                    return Err(GrammarError::TooLarge {
                        what: "pattern in bytes",
                        limit: PATTERN_BYTES_MAX,
                    });
                }
                if key == "enum" && item.as_array().is_some_and(|values| values.len() > ENUM_MAX) {
                    return Err(GrammarError::TooLarge { what: "number of enum values", limit: ENUM_MAX });
                }
                check_values(item)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Refuses multiples of numbers whose remainders are too many to be told apart.
fn check_steps(schema: &Value) -> Result<(), GrammarError> {
    let mut steps = Vec::new();
    collect_steps(schema, &mut steps);
    let too_large = |limit: u64| GrammarError::TooLarge { what: "step in multipleOf", limit: limit as usize };
    let scaled = steps.iter().map(|step| decimal(*step).filter(|(number, _)| *number <= STEP_MAX));
    let scaled: Vec<(u64, u32)> = scaled.collect::<Option<_>>().ok_or_else(|| too_large(STEP_MAX))?;
    let places = scaled.iter().map(|(_, places)| *places).max().unwrap_or(0);
    let together = scaled.iter().try_fold(1, |together: u64, (number, own)| {
        let number = number.checked_mul(10_u64.checked_pow(places - own)?)?;
        let common = (together / gcd(together, number).max(1)).checked_mul(number.max(1))?;
        (common <= STEPS_MAX).then_some(common)
    });
    together.map(drop).ok_or_else(|| too_large(STEPS_MAX))
}

fn collect_steps(value: &Value, steps: &mut Vec<f64>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| collect_steps(item, steps)),
        Value::Object(object) => {
            // One of no sign is refused by the compiler, or ignored.
            let step = object.get("multipleOf").and_then(Value::as_f64).map(f64::abs);
            steps.extend(step.filter(|step| *step > 0.0));
            object.values().for_each(|item| collect_steps(item, steps));
        }
        _ => {}
    }
}

/// A number as a whole one and how many of its digits are decimal places, as the compiler takes it; `None` if it has too many.
fn decimal(mut number: f64) -> Option<(u64, u32)> {
    let mut places = 0;
    while number.fract() != 0.0 {
        number *= 10.0;
        places += 1;
        if places > DECIMALS_MAX {
            return None;
        }
    }
    (number <= 1e15).then_some((number as u64, places))
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

struct Walk<'v> {
    root: &'v Value,
    budget: usize,
    /// References that stand alone; each is compiled once.
    seen: HashSet<&'v str>,
    pending: Vec<&'v Value>,
}

impl<'v> Walk<'v> {
    /// Visits the schema that is all of `all` at once, as merging builds it: references and `allOf` are unfolded,
    /// each choice is taken in turn with everything else, and members of the same name are merged in turn.
    fn visit(&mut self, all: Vec<&'v Value>, depth: usize) -> Result<(), GrammarError> {
        if depth > 2 * DEPTH_MAX {
            return Err(GrammarError::TooLarge { what: "nesting after merging", limit: 2 * DEPTH_MAX });
        }
        let alone = all.len() == 1;
        let mut open = all;
        let mut objects: Vec<&'v Map<String, Value>> = Vec::new();
        let mut choices: Vec<&'v Vec<Value>> = Vec::new();
        let mut unfolded = HashSet::new();
        while let Some(schema) = open.pop() {
            self.budget = self.budget.checked_sub(1).ok_or(GrammarError::TooLarge {
                what: "number of schemas after merging allOf and anyOf",
                limit: EXPANSION_MAX,
            })?;
            let Some(object) = schema.as_object() else { continue };
            if let Some(reference) = object.get("$ref").and_then(Value::as_str) {
                if alone && object.len() == 1 {
                    // Compiled once under its name, however often it is used.
                    if self.seen.insert(reference) {
                        self.pending.extend(self.target(reference));
                    }
                } else if unfolded.insert(reference) {
                    open.extend(self.target(reference));
                }
            }
            open.extend(object.get("allOf").and_then(Value::as_array).into_iter().flatten());
            choices.extend(["anyOf", "oneOf"].iter().filter_map(|key| object.get(*key)?.as_array()));
            objects.push(object);
        }
        if choices.len() > CHOICES_MAX {
            let what = "number of anyOf and oneOf that apply at once";
            return Err(GrammarError::TooLarge { what, limit: CHOICES_MAX });
        }
        self.visit_choices(&objects, &choices, Vec::new(), depth)
    }

    /// Every combination of one option from each of `choices`, merged with `objects`.
    fn visit_choices(
        &mut self,
        objects: &[&'v Map<String, Value>],
        choices: &[&'v Vec<Value>],
        taken: Vec<&'v Value>,
        depth: usize,
    ) -> Result<(), GrammarError> {
        match choices.split_first() {
            Some((first, rest)) => first.iter().try_for_each(|option| {
                let mut taken = taken.clone();
                taken.push(option);
                self.visit_choices(objects, rest, taken, depth)
            }),
            None if taken.is_empty() => self.visit_members(objects, depth),
            None => {
                // The options may bring members of their own, to be merged with those at hand.
                self.visit_members(objects, depth)?;
                self.visit(taken, depth + 1)
            }
        }
    }

    fn visit_members(
        &mut self,
        objects: &[&'v Map<String, Value>],
        depth: usize,
    ) -> Result<(), GrammarError> {
        let mut by_name: HashMap<(&str, &str), Vec<&'v Value>> = HashMap::new();
        for object in objects {
            for (key, value) in object.iter() {
                match (key.as_str(), value) {
                    ("properties" | "patternProperties", Value::Object(members)) => {
                        for (name, member) in members {
                            by_name.entry((key, name)).or_default().push(member);
                        }
                    }
                    ("items" | "prefixItems", Value::Array(members)) => {
                        for member in members {
                            by_name.entry((key, "")).or_default().push(member);
                        }
                    }
                    ("items" | "additionalProperties" | "additionalItems" | "not", member) => {
                        by_name.entry((key, "")).or_default().push(member);
                    }
                    _ => {}
                }
            }
        }
        by_name.into_values().try_for_each(|members| self.visit(members, depth + 1))
    }

    fn target(&self, reference: &str) -> Option<&'v Value> {
        let pointer = reference.strip_prefix('#')?;
        if pointer.is_empty() { Some(self.root) } else { self.root.pointer(pointer) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn ordinary_schemas_pass() {
        let schema = json!({
            "type": "object",
            "properties": {"a": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/n"}]}, "n": {"$ref": "#/$defs/n"}},
            "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}},
        });
        check_schema(&schema).unwrap();
    }

    #[test]
    fn products_of_choices_are_refused() {
        let choice = json!({"anyOf": (0..10).map(|i| json!({"const": i})).collect::<Vec<_>>()});
        let schema = json!({"allOf": vec![choice; 20]});
        assert!(matches!(check_schema(&schema), Err(GrammarError::TooLarge { .. })));
    }

    #[test]
    fn steps_that_take_long_to_count_through_are_refused() {
        for step in ["524287", "4294967294", "999999.5", "-2097151.5", "1e-9", "1e300", "0.30000000000000004"]
        {
            let schema = serde_json::from_str(&format!("{{\"multipleOf\": {step}}}")).unwrap();
            assert!(matches!(check_schema(&schema), Err(GrammarError::TooLarge { .. })), "{step}");
        }
        let steps = [97, 101, 103].map(|step| json!({"multipleOf": step}));
        let merged = json!({"allOf": steps});
        assert!(matches!(check_schema(&merged), Err(GrammarError::TooLarge { .. })));
        check_schema(&json!({"items": [{"multipleOf": 0.01}, {"multipleOf": 5}, {"multipleOf": 250}]}))
            .unwrap();
    }

    #[test]
    fn a_source_that_nests_too_deeply_is_refused_but_quoted_brackets_are_free() {
        assert!(check_source(&"[".repeat(100_000), &['"']).is_err());
        check_source(&format!("\"{}\"", "[".repeat(1000)), &['"']).unwrap();
        assert!(check_source(&" ".repeat(SOURCE_BYTES_MAX + 1), &['"']).is_err());
    }
}
