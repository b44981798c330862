//! A gate on the instructions of the hot AVX2 kernels: unlike time, they are the same on every run and every machine.
//!
//! When a kernel changed on purpose, write the counts anew and look at the difference:
//! `ASHLAR_RECORD=1 cargo test --release -p ashlar-kernels --test instruction_counts`
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(unreachable_pub, reason = "modules of one test")]

#[path = "../common/mod.rs"]
mod common;
mod count;
mod kernels;
mod table;

use ashlar_kernels::{Isa, Kernels};
use kernels::Case;
use std::collections::BTreeMap;
use table::{RECORD, Table, Verdict};

/// Instructions of one call; an earlier one has brought memory and lazily made things into place.
fn count(case: &mut Case, kernels: &Kernels) -> u64 {
    (case.run)(kernels);
    count::instructions(&mut || (case.run)(kernels))
}

/// Says why nothing can be counted here.
fn is_skipped() -> bool {
    let reason = if cfg!(debug_assertions) {
        "counts are those of the release profile: cargo test --release"
    } else if !Isa::Avx2.is_available() {
        "this machine does not have AVX2"
    } else if !count::is_supported() {
        "this system does not deliver the processor's single-step traps"
    } else {
        return false;
    };
    eprintln!("SKIPPED: instruction counts: {reason}");
    true
}

#[test]
fn no_kernel_takes_more_instructions_than_recorded() {
    if is_skipped() {
        return;
    }
    let one_thread = Kernels::new(Isa::Avx2, 1);
    let mut cases = kernels::cases();
    let counts: BTreeMap<String, u64> =
        cases.iter_mut().map(|case| (case.name.clone(), count(case, &one_thread))).collect();
    let counted = Table { compiler: table::compiler(), counts };
    let text =
        counted.text(|kernel| cases.iter().find(|case| case.name == kernel).expect("counted").operations);
    println!("{text}");
    if std::env::var_os("ASHLAR_RECORD").is_some() {
        return std::fs::write(Table::path(), text).expect("the record can be written");
    }
    let recorded = Table::parse(&std::fs::read_to_string(Table::path()).unwrap_or_default());
    let mut complaints = Vec::new();
    for (kernel, &count) in &counted.counts {
        let before = recorded.counts.get(kernel).copied().unwrap_or(0);
        let change = 100.0 * (count as f64 / before as f64 - 1.0);
        match recorded.judge(kernel, count, &counted.compiler) {
            Verdict::Holds => {}
            Verdict::Worse => {
                complaints.push(format!("{kernel} became slower: {before} → {count} ({change:+.1} %)"))
            }
            Verdict::Better => complaints.push(format!(
                "{kernel} became faster: {before} → {count} ({change:+.1} %); record it, so that it stays"
            )),
            Verdict::Unknown => complaints.push(format!("{kernel} has no record")),
        }
    }
    let gone = recorded.counts.keys().filter(|kernel| !counted.counts.contains_key(*kernel));
    complaints.extend(gone.map(|kernel| format!("{kernel} is recorded but not counted")));
    assert!(
        complaints.is_empty(),
        "instructions of the AVX2 kernels ({}, recorded with {}):\n{}\nwhere that is meant: {RECORD}",
        counted.compiler,
        recorded.compiler,
        complaints.join("\n")
    );
}

#[test]
fn counts_are_exact_and_a_slower_kernel_would_fail() {
    if is_skipped() {
        return;
    }
    let recorded = Table::parse(&std::fs::read_to_string(Table::path()).expect("counts are recorded"));
    let mut cases = kernels::cases();
    let case = cases.iter_mut().find(|case| case.name == "rms_norm").expect("it is counted");
    let (vectors, scalars) = (Kernels::new(Isa::Avx2, 1), Kernels::new(Isa::Portable, 1));
    assert_eq!(count(case, &vectors), count(case, &vectors), "the same work, the same count");
    let slower = count(case, &scalars);
    assert_eq!(
        recorded.judge(&case.name, slower, "another compiler"),
        Verdict::Worse,
        "{slower} instructions"
    );
}
