//! What a template may cost: it comes with a model, and who made that is a stranger.
//!
//! The engine counts instructions ([`FUEL`](super::FUEL)); the length of the source and of what is rendered is bounded here. Whatever
//! of its own the engine gets wrong ends the rendering. What a single instruction costs nobody bounds: strings that are joined to
//! themselves, and values within values, take what memory and stack there is.

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
