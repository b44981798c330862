//! Edits of JSON that leave it JSON: values of other types, numbers that break things, members that come, go and repeat.

use crate::random::Random;
use serde_json::{Map, Value};

/// Deepest nesting that is made on purpose: far beyond what parsers follow.
const DEPTH_MAX: usize = 4096;

/// The same JSON with a few edits. What it becomes is text, for not everything that breaks a parser can be a [`Value`].
pub fn edited(json: &[u8], words: &[Vec<u8>], random: &mut Random) -> Option<Vec<u8>> {
    let mut root: Value = serde_json::from_slice(json).ok()?;
    let edits = 1 + random.below(3);
    for _ in 0..edits {
        let count = count(&root);
        let mut place = random.below(count);
        let donor = nth(&root, &mut random.below(count)).cloned().unwrap_or(Value::Null);
        if let Some(value) = nth_mut(&mut root, &mut place) {
            edit(value, donor, words, random);
        }
    }
    let mut text = serde_json::to_vec(&root).ok()?;
    if random.one_in(16) {
        text = nested(&text, random);
    }
    if random.one_in(16) {
        text = doubled_key(&text, random);
    }
    Some(text)
}

fn edit(value: &mut Value, donor: Value, words: &[Vec<u8>], random: &mut Random) {
    match (random.below(10), &mut *value) {
        (0..4, Value::Number(number)) => *value = odd_json(number.as_u64().unwrap_or(0), random),
        (0..4, Value::String(text)) => edit_text(text, words, random),
        (0..2, Value::Array(items)) if !items.is_empty() => {
            let item = items[random.below(items.len())].clone();
            let copies = random.length(300);
            items.extend(std::iter::repeat_n(item, copies));
        }
        (2, Value::Array(items)) if !items.is_empty() => {
            items.remove(random.below(items.len()));
        }
        (3, Value::Array(items)) => items.push(donor),
        (0..2, Value::Object(members)) if !members.is_empty() => {
            let name = members.keys().nth(random.below(members.len())).cloned().unwrap_or_default();
            members.shift_remove(&name);
        }
        (2, Value::Object(members)) if !members.is_empty() => rename(members, words, random),
        (3, Value::Object(members)) => {
            members.insert(word(words, random), donor);
        }
        (4 | 5, _) => *value = donor,
        _ => *value = small(words, random),
    }
}

fn rename(members: &mut Map<String, Value>, words: &[Vec<u8>], random: &mut Random) {
    let name = members.keys().nth(random.below(members.len())).cloned().unwrap_or_default();
    if let Some(value) = members.shift_remove(&name) {
        members.insert(word(words, random), value);
    }
}

fn edit_text(text: &mut String, words: &[Vec<u8>], random: &mut Random) {
    let at = text.char_indices().map(|(at, _)| at).nth(random.below(text.chars().count() + 1));
    let at = at.unwrap_or(text.len());
    match random.below(6) {
        0 => text.truncate(at),
        1 => text.insert_str(at, &word(words, random)),
        2 => *text = word(words, random),
        3 => *text = text.repeat(1 + random.length(40)),
        4 => text.insert(at, char::from_u32(random.below(0x11_0000) as u32).unwrap_or('\u{fffd}')),
        _ => text.insert_str(at, &odd_json(0, random).to_string()),
    }
}

/// A word of the target's, as text.
fn word(words: &[Vec<u8>], random: &mut Random) -> String {
    const OWN: [&str; 8] = ["", "\0", "\u{202e}", "../..", "NaN", "-0", "\u{1F600}", "a\nb"];
    if words.is_empty() || random.one_in(8) {
        return (*random.pick(&OWN)).to_owned();
    }
    String::from_utf8_lossy(random.pick::<Vec<u8>>(words)).into_owned()
}

fn small(words: &[Vec<u8>], random: &mut Random) -> Value {
    match random.below(8) {
        0 => Value::Null,
        1 => Value::Bool(random.one_in(2)),
        2 => Value::Array(Vec::new()),
        3 => Value::Object(Map::new()),
        4 | 5 => Value::String(word(words, random)),
        _ => odd_json(random.below(1000) as u64, random),
    }
}

fn odd_json(near: u64, random: &mut Random) -> Value {
    match random.below(4) {
        0 => Value::from(random.odd_number(near) as i64),
        1 => {
            const FLOATS: [f64; 9] =
                [0.5, -0.0, 1e-320, f64::MAX, f64::MIN, f64::EPSILON, 1e18, 9.007_199_254_740_993e15, -1.5];
            Value::from(*random.pick(&FLOATS))
        }
        _ => Value::from(random.odd_number(near)),
    }
}

/// Brackets around all of it.
fn nested(text: &[u8], random: &mut Random) -> Vec<u8> {
    let depth = random.length(DEPTH_MAX);
    let (open, close): (&[u8], &[u8]) = if random.one_in(2) { (b"[", b"]") } else { (b"{\"a\":", b"}") };
    [open.repeat(depth), text.to_vec(), close.repeat(depth)].concat()
}

/// A key that is there twice, which no [`Value`] has.
fn doubled_key(text: &[u8], random: &mut Random) -> Vec<u8> {
    let colons: Vec<usize> = (0..text.len()).filter(|&at| text[at..].starts_with(b"\":")).collect();
    if colons.is_empty() {
        return text.to_vec();
    }
    let colon = *random.pick(&colons);
    let Some(quote) = text[..colon].iter().rposition(|&byte| byte == b'"') else { return text.to_vec() };
    let key = &text[quote..colon + 2];
    [&text[..quote], key, b"0,", &text[quote..]].concat()
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(members) => members.values().map(count).sum(),
        _ => 0,
    }
}

fn children(value: &Value) -> Box<dyn Iterator<Item = &Value> + '_> {
    match value {
        Value::Array(items) => Box::new(items.iter()),
        Value::Object(members) => Box::new(members.values()),
        _ => Box::new(std::iter::empty()),
    }
}

/// The value number `place`, counted from the root in the order of the text.
fn nth<'v>(value: &'v Value, place: &mut usize) -> Option<&'v Value> {
    if *place == 0 {
        return Some(value);
    }
    *place -= 1;
    children(value).find_map(|child| nth(child, place))
}

fn nth_mut<'v>(value: &'v mut Value, place: &mut usize) -> Option<&'v mut Value> {
    if *place == 0 {
        return Some(value);
    }
    *place -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|child| nth_mut(child, place)),
        Value::Object(members) => members.values_mut().find_map(|child| nth_mut(child, place)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn edits_reach_every_value_and_mostly_leave_json() {
        let json = br#"{"a":[1,{"b":"text"}],"c":null}"#;
        let made: Vec<_> =
            (0..500).map(|index| edited(json, &[], &mut Random::new(1, index)).unwrap()).collect();
        let valid = made.iter().filter(|text| serde_json::from_slice::<Value>(text).is_ok()).count();
        assert!(valid > 400, "{valid}");
        for part in ["\"a\":", "text", "null"] {
            let has = |text: &&Vec<u8>| text.windows(part.len()).any(|found| found == part.as_bytes());
            let kept = made.iter().filter(has).count();
            assert!((50..500).contains(&kept), "{part}: {kept}");
        }
    }
}
