//! What templates expect of Python: `json.dumps`, string methods, and the `generation` tag.

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use std::fmt::Write;

/// Longest text that `tojson` makes, in bytes: its escapes grow when they are escaped again.
const JSON_BYTES_MAX: usize = 32 << 20;

/// Values nested deeper than this are refused; requests are parsed with the same bound.
const DEPTH_MAX: usize = 130;

/// Transformers' `tojson`: `json.dumps` with `ensure_ascii=False`, keys in their order.
pub(super) fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let indent = match indent {
        Some(indent) if !indent.is_none() => Some(match indent.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        }),
        _ => None,
    };
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        // With an indent a line break follows the comma, so Python leaves the space out.
        _ => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
    };
    let mut writer = JsonWriter {
        text: String::new(),
        indent,
        item_separator,
        key_separator,
        ensure_ascii: ensure_ascii.unwrap_or(false),
        sort_keys: sort_keys.unwrap_or(false),
    };
    writer.value(value, 0)?;
    Ok(Value::from(writer.text))
}

struct JsonWriter {
    text: String,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl JsonWriter {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::InvalidOperation, "the value is nested too deeply for tojson"));
        }
        if self.text.len() > JSON_BYTES_MAX {
            return Err(Error::new(ErrorKind::InvalidOperation, "the value is too long for tojson"));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                if value.is_integer() {
                    let _ = write!(self.text, "{value}");
                } else {
                    let number = f64::try_from(value.clone())?;
                    self.text.push_str(&float_repr(number));
                }
            }
            ValueKind::String => match value.as_str() {
                Some(text) if text.len() > JSON_BYTES_MAX => {
                    let message = "the value is too long for tojson";
                    return Err(Error::new(ErrorKind::InvalidOperation, message));
                }
                Some(text) => self.string(text),
                None => self.string(&value.to_string()),
            },
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group('[', ']', items.len(), depth, |writer, index| {
                    writer.value(&items[index], depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.group('{', '}', keys.len(), depth, |writer, index| {
                    match keys[index].as_str() {
                        Some(key) => writer.string(key),
                        None => writer.string(&keys[index].to_string()),
                    }
                    writer.text.push_str(&writer.key_separator.clone());
                    let item = value.get_item(&keys[index])?;
                    writer.value(&item, depth + 1)
                })?;
            }
            kind => {
                let message = format!("a value of kind {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn group(
        &mut self,
        open: char,
        close: char,
        len: usize,
        depth: usize,
        mut item: impl FnMut(&mut JsonWriter, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        for index in 0..len {
            if index > 0 {
                self.text.push_str(&self.item_separator.clone());
            }
            self.line_break(depth + 1);
            item(self, index)?;
        }
        if len > 0 {
            self.line_break(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn line_break(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            for _ in 0..depth {
                self.text.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for c in text.chars() {
            match c {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.text, "\\u{unit:04x}");
                    }
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

/// Python's `repr` of a float: shortest digits, an exponent outside 1e-4 ≤ |x| < 1e16, at least one decimal.
fn float_repr(number: f64) -> String {
    if number.is_nan() {
        return "NaN".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    let magnitude = number.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(rest) => ('-', rest),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = number.to_string();
    if text.contains('.') { text } else { text + ".0" }
}

/// Jinja's `int`: what is no number becomes the default.
pub(super) fn int(value: &Value, default: Option<Value>) -> Value {
    let default = || default.unwrap_or_else(|| Value::from(0));
    if let Some(text) = value.as_str() {
        let text = text.trim();
        let whole = text.parse::<i64>().ok();
        return whole.or_else(|| truncated(text.parse().ok()?)).map_or_else(default, Value::from);
    }
    match value.kind() {
        ValueKind::Bool => Value::from(i64::from(value.is_true())),
        ValueKind::Number if value.is_integer() => value.clone(),
        ValueKind::Number => {
            f64::try_from(value.clone()).ok().and_then(truncated).map_or_else(default, Value::from)
        }
        _ => default(),
    }
}

fn truncated(number: f64) -> Option<i64> {
    (number.abs() < 9e18).then_some(number as i64)
}

/// Jinja's `float`: what is no number becomes the default.
pub(super) fn float(value: &Value, default: Option<Value>) -> Value {
    let number = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.kind() == ValueKind::Number => f64::try_from(value.clone()).ok(),
        None if value.kind() == ValueKind::Bool => Some(if value.is_true() { 1.0 } else { 0.0 }),
        None => None,
    };
    number.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from)
}

/// Jinja's `is iterable`, which `none` is not.
pub(super) fn is_iterable(value: &Value) -> bool {
    match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number => false,
        ValueKind::Undefined | ValueKind::String => true,
        _ => value.try_iter().is_ok(),
    }
}

/// Python's methods on strings, lists and dicts.
pub(super) fn unknown_method(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match method {
            "format" => super::limits::check_brace_format(text)?,
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "partition" | "rpartition" => {
                let (separator,): (&str,) = from_args(args)?;
                let last = method == "rpartition";
                let found = if last { text.rsplit_once(separator) } else { text.split_once(separator) };
                let parts = match (found, last) {
                    (Some((before, after)), _) => [before, separator, after],
                    (None, false) => [text, "", ""],
                    (None, true) => ["", "", text],
                };
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            "rsplit" => {
                let (separator, limit): (&str, Option<usize>) = from_args(args)?;
                let mut parts: Vec<&str> = match limit {
                    Some(limit) => text.rsplitn(limit.saturating_add(1), separator).collect(),
                    None => text.rsplit(separator).collect(),
                };
                parts.reverse();
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Transformers' `{% generation %}` marks spans for training and prints nothing. The engine has no such tag, so it
/// becomes a condition that always holds, with the tag's own whitespace control.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // Behind the opening: `{%}` opens and closes nothing.
        let Some(length) = rest[start + 2..].find("%}").map(|length| length + 2) else { break };
        let tag = &rest[start..start + length + 2];
        let inner = &tag[2..tag.len() - 2];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replaced = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        text.push_str(&rest[..start]);
        match replaced {
            Some(new) => text.push_str(&tag.replacen(word, new, 1)),
            None => text.push_str(tag),
        }
        rest = &rest[start + length + 2..];
    }
    text + rest
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn floats_print_as_python_prints_them() {
        for (number, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (-1e300, "-1e+300"),
            (0.0, "0.0"),
        ] {
            assert_eq!(float_repr(number), text);
        }
    }

    #[test]
    fn generation_tags_keep_their_whitespace_control() {
        assert_eq!(
            without_generation_tags("a {%- generation -%} b {% endgeneration %}{% if x %}{% endif %} {%"),
            "a {%- if true -%} b {% endif %}{% if x %}{% endif %} {%"
        );
        assert_eq!(without_generation_tags("{%}{% x %}"), "{%}{% x %}");
    }
}
