//! The recorded counts, and what is said of a new one.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// More than this share of the recorded count fails, where the compiler is the one that it was recorded with.
const MOST: f64 = 1.02;
/// The same with another compiler, which may choose other instructions.
const MOST_ELSEWHERE: f64 = 1.10;
/// Below this share the record has become slack and would hide a later loss.
const LEAST: f64 = 0.95;

/// How to write the counts anew.
pub const RECORD: &str = "ASHLAR_RECORD=1 cargo test --release -p ashlar-kernels --test instruction_counts";

/// Counts by kernel, and the compiler that they stand for.
#[derive(Debug, Default, PartialEq)]
pub struct Table {
    /// As the compiler calls itself.
    pub compiler: String,
    /// Instructions by kernel.
    pub counts: BTreeMap<String, u64>,
}

/// What is said of a count.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As recorded, or near it.
    Holds,
    /// So much fewer that the record should follow.
    Better,
    /// More than is let pass.
    Worse,
    /// There is no record.
    Unknown,
}

impl Table {
    /// Where the counts are kept.
    pub fn path() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/instruction_counts/counts.txt")
    }

    /// Reads `compiler …` and lines of `kernel count …`; `#` begins a comment.
    pub fn parse(text: &str) -> Table {
        let mut table = Table::default();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
            if let Some(compiler) = line.strip_prefix("compiler ") {
                table.compiler = compiler.to_owned();
                continue;
            }
            let mut words = line.split_whitespace();
            let kernel = words.next().expect("a line is not empty");
            let count = words.next().and_then(|word| word.parse().ok());
            table.counts.insert(kernel.to_owned(), count.unwrap_or_else(|| panic!("no count in {line:?}")));
        }
        table
    }

    /// The file's text; `operations` are the kernels' multiply-adds or elements.
    pub fn text(&self, operations: impl Fn(&str) -> (u64, &'static str)) -> String {
        let mut text = format!(
            "# Instructions that one call of each kernel retires with AVX2 on one thread. The test beside this file fails\n\
             # when a count grows. Recorded by: {RECORD}\n\
             compiler {}\n",
            self.compiler
        );
        for (kernel, count) in &self.counts {
            let (operations, of) = operations(kernel);
            let each = *count as f64 / operations as f64;
            writeln!(text, "{kernel:<28} {count:>8}   # {each:.3} per {of}").expect("a string takes all");
        }
        text
    }

    /// What to say of `count`, counted with `compiler`.
    pub fn judge(&self, kernel: &str, count: u64, compiler: &str) -> Verdict {
        let Some(&recorded) = self.counts.get(kernel) else { return Verdict::Unknown };
        let share = count as f64 / recorded as f64;
        let same = compiler == self.compiler;
        match share {
            _ if share > if same { MOST } else { MOST_ELSEWHERE } => Verdict::Worse,
            _ if share < LEAST && same => Verdict::Better,
            _ => Verdict::Holds,
        }
    }
}

/// The compiler of this program, as it wrote itself into the program's file; empty if that was stripped.
pub fn compiler() -> String {
    const BEGIN: &[u8] = b"rustc version ";
    let program = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    // The words above are in the file too, but no number follows them.
    let mut found = program.windows(BEGIN.len() + 1).enumerate();
    let at = found.find(|(_, window)| window.starts_with(BEGIN) && window[BEGIN.len()].is_ascii_digit());
    let name = at.map_or(&[][..], |(at, _)| &program[at..]);
    let end = name.iter().position(|&byte| byte == b')').map_or(0, |last| last + 1);
    String::from_utf8_lossy(&name[..end]).into_owned()
}

#[test]
fn a_count_is_held_to_its_record() {
    let table = Table::parse("# comment\ncompiler rustc 1\n\nnorm 1000  # 2.0 per element\n");
    assert_eq!(table.counts, BTreeMap::from([("norm".to_owned(), 1000)]));
    assert_eq!(Table::parse(&table.text(|_| (500, "element"))), table);
    for (count, compiler, verdict) in [
        (1000, "rustc 1", Verdict::Holds),
        (1020, "rustc 1", Verdict::Holds),
        (1021, "rustc 1", Verdict::Worse),
        (949, "rustc 1", Verdict::Better),
        (1100, "rustc 2", Verdict::Holds),
        (1101, "rustc 2", Verdict::Worse),
        (900, "rustc 2", Verdict::Holds),
    ] {
        assert_eq!(table.judge("norm", count, compiler), verdict, "{count} with {compiler}");
    }
    assert_eq!(table.judge("rope", 1, "rustc 1"), Verdict::Unknown);
}
