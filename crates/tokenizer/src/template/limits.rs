//! What a template may cost: it comes with a model, and who made that is a stranger.
//!
//! The engine counts instructions ([`FUEL`](super::FUEL)); what it does not bound is bounded here: the length of the source and of
//! what is rendered, and values that contain themselves. Whatever of its own it gets wrong ends the rendering, not the process.

use super::{TemplateError, classify};
use minijinja::{Template, Value};
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Longest source of a template, in bytes: ten times the longest known.
const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Most lines, and longest line: the engine counts both in 16 bits.
const LINES_MAX: usize = 60_000;
/// Longest text that is rendered, in bytes: four times the longest request.
const OUTPUT_BYTES_MAX: usize = 64 << 20;

/// Refuses sources that the engine cannot take.
pub(super) fn check_source(source: &str) -> Result<(), TemplateError> {
    let refuse = |what: String| Err(TemplateError::Syntax(what));
    if source.len() > SOURCE_BYTES_MAX {
        return refuse(format!("it has {} bytes, at most {SOURCE_BYTES_MAX} are read", source.len()));
    }
    let (lines, longest) = source
        .lines()
        .fold((0, 0), |(lines, longest): (usize, usize), line| (lines + 1, longest.max(line.len())));
    if lines > LINES_MAX || longest > LINES_MAX {
        return refuse(format!("it has more than {LINES_MAX} lines, or longer ones"));
    }
    match namespace_as_value(source) {
        Some(name) => refuse(format!("the namespace `{name}` is used as a value: use its attributes")),
        None => Ok(()),
    }
}

/// A namespace that is used otherwise than by its attributes: it could be put into itself, and printing it would never end.
fn namespace_as_value(source: &str) -> Option<String> {
    let words: Vec<&str> = tags(source).flat_map(words).collect();
    let before = |at: usize, back: usize| at.checked_sub(back).map_or("", |at| words[at]);
    let mut names = Vec::new();
    for at in (0..words.len()).filter(|at| words[*at] == "namespace" && before(*at, 1) != ".") {
        // `set name = namespace(`, and nothing else.
        let named = before(at, 1) == "=" && before(at, 3) == "set" && words.get(at + 1) == Some(&"(");
        if !named {
            return Some("namespace".to_owned());
        }
        names.push(before(at, 2));
    }
    let is_value = |at: &usize| {
        let attribute = matches!(words.get(at + 1), Some(&"." | &"["));
        let made = before(*at, 1) == "set" && words.get(at + 1) == Some(&"=");
        names.contains(&words[*at]) && before(*at, 1) != "." && !attribute && !made
    };
    (0..words.len()).find(is_value).map(|at| words[at].to_owned())
}

/// The insides of the tags of a template.
fn tags(source: &str) -> impl Iterator<Item = &str> {
    let mut rest = source;
    std::iter::from_fn(move || {
        loop {
            let at = rest.find('{')?;
            let after = &rest[at + 1..];
            let end = match after.as_bytes().first()? {
                b'%' => "%}",
                b'{' => "}}",
                _ => {
                    rest = after;
                    continue;
                }
            };
            // Strings may hold what looks like an end; more than a tag is no harm here, less would be.
            let inside = &after[1..];
            let length = end_of_tag(inside, end);
            rest = &inside[length..];
            return Some(&inside[..length]);
        }
    })
}

fn end_of_tag(inside: &str, end: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in inside.char_indices() {
        match quote {
            _ if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == '"' || c == '\'' => quote = Some(c),
            None if inside[at..].starts_with(end) => return at,
            None => {}
        }
    }
    inside.len()
}

/// Names and signs of a tag, without strings.
fn words(tag: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut rest = tag;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '"' | '\'' => {
                let inside = &rest[1..];
                1 + (end_of_string(inside, c) + 1).min(inside.len())
            }
            c if is_name(c) => rest.find(|c| !is_name(c)).unwrap_or(rest.len()),
            c => c.len_utf8(),
        };
        let word = &rest[..length];
        if !c.is_whitespace() {
            // A string is a value like any other.
            found.push(if c == '"' || c == '\'' { "''" } else { word });
        }
        rest = &rest[length..];
    }
    found
}

fn end_of_string(inside: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in inside.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at,
            _ => {}
        }
    }
    inside.len()
}

/// Renders no more than may be.
pub(super) fn render(template: &Template<'_, '_>, context: Value) -> Result<String, TemplateError> {
    let mut output = Output { bytes: Vec::new(), full: false };
    let rendered = template.render_captured_to(context, &mut output).map(drop);
    if output.full {
        return Err(TemplateError::Failed(format!("it makes more than {OUTPUT_BYTES_MAX} bytes of it")));
    }
    rendered.map_err(|error| classify(&error))?;
    String::from_utf8(output.bytes).map_err(|error| TemplateError::Failed(error.to_string()))
}

struct Output {
    bytes: Vec<u8>,
    full: bool,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > OUTPUT_BYTES_MAX - self.bytes.len() {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the engine so that a panic inside becomes an error.
pub(super) fn guarded<T>(run: impl FnOnce() -> Result<T, TemplateError>) -> Result<T, TemplateError> {
    let failed = |_| Err(TemplateError::Failed("the engine failed".to_owned()));
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_used_by_its_attributes_alone() {
        for good in [
            "{% set ns = namespace(a='', b=false) %}{% set ns.a = ns.a ~ 'ns' %}{{ ns.a }}{{ x.ns }}",
            "{%- set ns=namespace() -%}{% if ns.a is defined and not ns['a'] %}{% endif %} ns {# ns #}",
            "{{ '{{ ns }}' }}{{ \"a'b\" }}{% set namespaces = 1 %}{{ namespaces }}",
        ] {
            assert_eq!(check_source(good), Ok(()), "{good}");
        }
        for bad in [
            "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
            "{% set ns = namespace() %}{% set other = ns %}",
            "{% set ns = namespace() %}{% set ns.a = [ns] %}",
            "{{ [namespace()] }}",
            "{% set a, b = namespace(), 1 %}",
            "{% set make = namespace %}",
            "{% set ns = namespace() %}{{ '\\'' ~ ns }}",
        ] {
            assert!(check_source(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sources_that_the_engine_cannot_count_are_refused() {
        assert!(check_source(&"a".repeat(70_000)).is_err());
        assert!(check_source(&"\n".repeat(70_000)).is_err());
        assert!(check_source(&"abc\n".repeat(70_000)).is_err());
        assert_eq!(check_source(&"abc\n".repeat(50_000)), Ok(()));
    }
}
