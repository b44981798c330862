//! Jinja's `safe`, whose result escapes every plain string that it is joined to.
//!
//! Templates are rendered without escaping, yet in Jinja2 `'"' + (x|tojson|safe)` is `&#34;…`: `safe` makes a `Markup`
//! string and adding to that with `+` escapes the other side. Some templates (Mistral's v3) do this, and a model is served the
//! prompt that Transformers would build, so it is followed here: `safe` brackets its value with two noncharacters,
//! and printing escapes what a bracketed string has outside of its brackets.

use minijinja::{Error, Output, State, Value};

const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';

pub(super) fn safe(value: &Value) -> Value {
    match value.as_str() {
        Some(text) => Value::from(format!("{OPEN}{text}{CLOSE}")),
        None => Value::from(format!("{OPEN}{value}{CLOSE}")),
    }
}

/// Prints a value as Python does, resolving the brackets of [`safe`].
pub(super) fn print(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) if text.contains(OPEN) => out.write_str(&resolve(text)).map_err(Error::from),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

fn resolve(text: &str) -> String {
    let mut resolved = String::with_capacity(text.len());
    let mut depth = 0usize;
    for c in text.chars() {
        match c {
            OPEN => depth += 1,
            CLOSE => depth = depth.saturating_sub(1),
            c if depth > 0 => resolved.push(c),
            '&' => resolved.push_str("&amp;"),
            '<' => resolved.push_str("&lt;"),
            '>' => resolved.push_str("&gt;"),
            '\'' => resolved.push_str("&#39;"),
            '"' => resolved.push_str("&#34;"),
            c => resolved.push(c),
        }
    }
    resolved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_joined_to_a_safe_string_is_escaped() {
        let safe = safe(&Value::from("{\"a\"}"));
        assert_eq!(resolve(safe.as_str().unwrap_or_default()), "{\"a\"}");
        assert_eq!(resolve(&format!("\"x\" {safe} <y>")), "&#34;x&#34; {\"a\"} &lt;y&gt;");
    }
}
