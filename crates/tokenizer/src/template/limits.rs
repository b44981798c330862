//! What a template may cost: it comes with a model, and who made that is a stranger.
//!
//! The engine counts instructions ([`FUEL`](super::FUEL)); the length of the source and of what is rendered is bounded here. Whatever
//! of its own the engine gets wrong ends the rendering. Filters that make as much as a number says are told small numbers only. What
//! else a single instruction costs nobody bounds: strings that are joined to themselves, and values within values, take what memory and
//! stack there is.

use super::{TemplateError, classify};
use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Template, Value, filters};
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Longest source of a template, in bytes: ten times the longest known.
const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Most lines, and longest line: the engine counts both in 16 bits.
const LINES_MAX: usize = 60_000;
/// Longest text that is rendered, in bytes: four times the longest request.
const OUTPUT_BYTES_MAX: usize = 64 << 20;

/// Filters whose numbers say how much they make: each under a name that no template can write, and its own.
const COUNTED: [(&str, &str); 3] =
    [("indent", "the engine's indent"), ("slice", "the engine's slice"), ("batch", "the engine's batch")];
const FORMAT: (&str, &str) = ("format", "the engine's format");
/// Largest of these numbers: ten times what any known template says.
const COUNT_MAX: f64 = 10_000.0;
/// Most digits of a width or a precision in a format.
const WIDTH_DIGITS_MAX: usize = 4;

/// Puts itself between templates and filters that would make as much as they are told.
pub(super) fn bound_filters(environment: &mut Environment<'_>) {
    environment.add_filter(COUNTED[0].1, filters::indent);
    environment.add_filter(COUNTED[1].1, filters::slice);
    environment.add_filter(COUNTED[2].1, filters::batch);
    environment.add_filter(FORMAT.1, filters::format);
    for (name, engines) in COUNTED {
        let bounded = move |state: &mut State<'_, '_>, value: Value, rest: Rest<ValueOrKwargs>| {
            let mut arguments = vec![value];
            arguments.extend(rest.into_values());
            if arguments[1..].iter().any(is_large) {
                return Err(too_much(name));
            }
            state.apply_filter(engines, &arguments)
        };
        environment.add_filter(name, bounded);
    }
    let bounded = |state: &mut State<'_, '_>, value: Value, rest: Rest<ValueOrKwargs>| {
        check_percent_format(value.as_str().unwrap_or_default())?;
        let mut arguments = vec![value];
        arguments.extend(rest.into_values());
        state.apply_filter(FORMAT.1, &arguments)
    };
    environment.add_filter(FORMAT.0, bounded);
}

/// Whether a number, or one of those that are named, is larger than may be.
fn is_large(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Number => f64::try_from(value.clone()).is_ok_and(|number| number.abs() > COUNT_MAX),
        ValueKind::Map => value.try_iter().into_iter().flatten().any(|name| {
            value.get_item(&name).is_ok_and(|value| value.kind() == ValueKind::Number && is_large(&value))
        }),
        _ => false,
    }
}

/// Refuses formats of `%` that pad to tens of thousands, or to what an argument says (`*`).
fn check_percent_format(format: &str) -> Result<(), Error> {
    check_fields(format, '%', |c| c.is_ascii_alphabetic(), Some('*'))
}

/// The same of formats of braces, where `*` is what is padded with.
pub(super) fn check_brace_format(format: &str) -> Result<(), Error> {
    check_fields(format, '{', |c| c == '}', None)
}

/// Refuses more digits in a row than a width has, and a character, between what begins a field and what ends it.
fn check_fields(
    format: &str,
    begins: char,
    ends: fn(char) -> bool,
    refused: Option<char>,
) -> Result<(), Error> {
    let (mut in_field, mut digits) = (false, 0);
    for c in format.chars() {
        digits = if in_field && c.is_ascii_digit() { digits + 1 } else { 0 };
        if digits > WIDTH_DIGITS_MAX || in_field && Some(c) == refused {
            return Err(too_much("format"));
        }
        in_field = c == begins || in_field && !ends(c);
    }
    Ok(())
}

fn too_much(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("`{what}` is told to make more than {COUNT_MAX}"))
}

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
    Ok(())
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
    fn sources_that_the_engine_cannot_count_are_refused() {
        assert!(check_source(&"a".repeat(70_000)).is_err());
        assert!(check_source(&"\n".repeat(70_000)).is_err());
        assert!(check_source(&"abc\n".repeat(70_000)).is_err());
        assert_eq!(check_source(&"abc\n".repeat(50_000)), Ok(()));
    }

    #[test]
    fn filters_make_no_more_than_a_template_may_want() {
        let mut environment = Environment::new();
        bound_filters(&mut environment);
        environment.set_unknown_method_callback(super::super::python::unknown_method);
        let rendered = |source: &str| {
            let rendered = environment.render_str(source, ());
            rendered.map_err(|error| error.to_string())
        };
        for (source, expected) in [
            ("{{ 'a\nb'|indent(2, true) }}", "  a\n  b"),
            ("{{ 'a\nb'|indent(width=1) }}", "a\n b"),
            ("{{ [1, 2, 3]|slice(2)|list }}", "[[1, 2], [3]]"),
            ("{{ [1, 2, 3]|batch(2, 0)|list }}", "[[1, 2], [3, 0]]"),
            ("{{ '%5d|%.2f|%s'|format(1234567, 2.5, 'x') }}", "1234567|2.50|x"),
            ("{{ '123456 * %s'|format(7) }}", "123456 * 7"),
            ("{{ '{:>4}{}'.format('a', 123456) }}", "   a123456"),
            ("{{ '123456 {:*^5}'.format('a') }}", "123456 **a**"),
        ] {
            assert_eq!(rendered(source).as_deref(), Ok(expected), "{source}");
        }
        for source in [
            "{{ 'a'|indent(4294967295, true) }}",
            "{{ 'a'|indent(width=4294967295, first=true) }}",
            "{{ [1]|slice(4294967295) }}",
            "{{ [1]|batch(4294967295, 1) }}",
            "{{ [1]|batch(1e18, 1) }}",
            "{{ '%4294967295d'|format(3) }}",
            "{{ '%.99999f'|format(3) }}",
            "{{ '%-*d'|format(4294967295, 3) }}",
            "{{ '{:>4294967295}'.format('a') }}",
        ] {
            let error = rendered(source).expect_err(source);
            assert!(error.contains("is told to make more than"), "{source}: {error}");
        }
    }

    #[test]
    fn what_the_engine_gets_wrong_and_what_is_too_long_ends_the_rendering() {
        let rendered = |source: &str| {
            let mut environment = minijinja::Environment::new();
            environment.add_template("x", source).map_err(|error| classify(&error))?;
            let template = environment.get_template("x").map_err(|error| classify(&error))?;
            guarded(|| render(&template, Value::UNDEFINED))
        };
        assert_eq!(rendered("{{ 'abc'[::-1] }}"), Ok("cba".to_owned()));
        // Backwards through nothing.
        assert!(!matches!(rendered("{{ ''[::-1] }}"), Err(TemplateError::OutOfFuel)));
        let long = "{% set x = 'a' * 1000000 %}{% for i in range(100) %}{{ x }}{% endfor %}";
        assert!(matches!(rendered(long), Err(TemplateError::Failed(_))));
    }
}
