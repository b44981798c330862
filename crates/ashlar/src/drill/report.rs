//! What a drill came to.

use super::load::Noticed;
use super::{Kind, Role};
use crate::bench::stats::percentile;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

/// One fault.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct FaultRecord {
    process: String,
    kind: Kind,
    /// From the fault until the cluster was as it should be.
    recovered_s: f64,
    #[serde(flatten)]
    noticed: Noticed,
}

impl FaultRecord {
    pub(super) fn new(process: &str, kind: Kind, recovered: Duration, noticed: Noticed) -> FaultRecord {
        FaultRecord { process: process.to_owned(), kind, recovered_s: recovered.as_secs_f64(), noticed }
    }

    /// What was noticed afterwards.
    pub(super) fn add(&mut self, rest: Noticed) {
        self.noticed.completed += rest.completed;
        self.noticed.cut += rest.cut;
        self.noticed.resumed += rest.resumed;
        self.noticed.changed += rest.changed;
        self.noticed.hung += rest.hung;
        self.noticed.errors.extend(rest.errors);
    }

    fn longest_stall_s(&self) -> f64 {
        self.noticed.stalls_s.iter().copied().fold(0.0, f64::max)
    }

    /// For people who watch.
    pub(super) fn line(&self, number: usize) -> String {
        let noticed = &self.noticed;
        let mut line = format!(
            "{:>4}  {:<6} {:<10} longest stall {:.2} s, whole after {:.2} s",
            number + 1,
            self.kind.word(),
            self.process,
            self.longest_stall_s(),
            self.recovered_s
        );
        if noticed.cut > 0 {
            line += &format!(", {} cut off and asked again", noticed.cut);
        }
        if noticed.resumed > 0 {
            line += &format!(", {} resumed", noticed.resumed);
        }
        if noticed.changed + noticed.hung > 0 || !noticed.errors.is_empty() {
            line +=
                &format!("; CHANGED {}, HUNG {}, ERRORS {:?}", noticed.changed, noticed.hung, noticed.errors);
        }
        line
    }
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Kind::Kill => "kill",
            Kind::Freeze => "freeze",
        }
    }
}

/// The records of a log; none where there is no file.
pub(super) fn read(path: &Path) -> Result<Vec<FaultRecord>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let record = |(number, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("{}, line {}", path.display(), number + 1))
    };
    text.lines().enumerate().filter(|(_, line)| !line.is_empty()).map(record).collect()
}

/// All faults together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    faults: usize,
    completed: u64,
    cut_off_with_their_gateway: u64,
    resumed: u64,
    changed: u64,
    hung: u64,
    errors: usize,
    by_fault: Vec<Row>,
}

/// Faults of one kind to one role.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    role: Role,
    kind: Kind,
    faults: usize,
    /// Over streams and faults, in seconds.
    stall_p50_s: f64,
    stall_p99_s: f64,
    stall_max_s: f64,
    recovery_p50_s: f64,
    recovery_max_s: f64,
}

impl Report {
    pub(super) fn of(records: &[FaultRecord]) -> Report {
        let sum = |field: fn(&Noticed) -> u64| records.iter().map(|record| field(&record.noticed)).sum();
        let mut by_fault = Vec::new();
        for role in [Role::Node, Role::Scheduler, Role::Gateway] {
            for kind in [Kind::Kill, Kind::Freeze] {
                let same = |record: &&FaultRecord| Role::of(&record.process) == role && record.kind == kind;
                by_fault.extend(Row::of(role, kind, &records.iter().filter(same).collect::<Vec<_>>()));
            }
        }
        Report {
            faults: records.len(),
            completed: sum(|noticed| noticed.completed),
            cut_off_with_their_gateway: sum(|noticed| noticed.cut),
            resumed: sum(|noticed| noticed.resumed),
            changed: sum(|noticed| noticed.changed),
            hung: sum(|noticed| noticed.hung),
            errors: records.iter().map(|record| record.noticed.errors.len()).sum(),
            by_fault,
        }
    }

    /// Whether no client noticed more than a pause.
    pub(super) fn is_clean(&self) -> bool {
        self.changed == 0 && self.hung == 0 && self.errors == 0
    }
}

impl Row {
    fn of(role: Role, kind: Kind, records: &[&FaultRecord]) -> Option<Row> {
        let stalls: Vec<f64> =
            records.iter().flat_map(|record| record.noticed.stalls_s.iter().copied()).collect();
        let recoveries: Vec<f64> = records.iter().map(|record| record.recovered_s).collect();
        let max = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        (!records.is_empty()).then(|| Row {
            role,
            kind,
            faults: records.len(),
            stall_p50_s: percentile(&stalls, 50.0),
            stall_p99_s: percentile(&stalls, 99.0),
            stall_max_s: max(&stalls),
            recovery_p50_s: percentile(&recoveries, 50.0),
            recovery_max_s: max(&recoveries),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "role       fault   faults   stall p50    p99    max   whole again p50    max   (seconds)"
        )?;
        for row in &self.by_fault {
            writeln!(
                f,
                "{:<10} {:<7} {:>6} {:>11.2} {:>6.2} {:>6.2} {:>17.2} {:>6.2}",
                format!("{:?}", row.role).to_lowercase(),
                row.kind.word(),
                row.faults,
                row.stall_p50_s,
                row.stall_p99_s,
                row.stall_max_s,
                row.recovery_p50_s,
                row.recovery_max_s
            )?;
        }
        writeln!(
            f,
            "{} streams completed, {} cut off with their gateway and asked again, {} times resumed; {} changed, {} hung, {} errors",
            self.completed,
            self.cut_off_with_their_gateway,
            self.resumed,
            self.changed,
            self.hung,
            self.errors
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn record(process: &str, kind: Kind, noticed: Noticed) -> FaultRecord {
        FaultRecord::new(process, kind, Duration::from_millis(500), noticed)
    }

    #[test]
    fn faults_are_told_apart_and_a_log_is_read_back() {
        let stalled =
            |stalls_s: &[f64]| Noticed { stalls_s: stalls_s.to_vec(), completed: 2, ..Noticed::default() };
        let records = [
            record("node-0", Kind::Kill, stalled(&[0.1, 0.3])),
            record("node-1", Kind::Kill, stalled(&[0.2, 0.4])),
            record("scheduler", Kind::Freeze, stalled(&[1.0, 1.2])),
        ];
        let report = Report::of(&records);
        assert!(report.is_clean());
        assert_eq!((report.faults, report.completed, report.by_fault.len()), (3, 6, 2));
        assert_eq!((report.by_fault[0].faults, report.by_fault[0].stall_max_s), (2, 0.4));
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines: Vec<String> =
            records.iter().map(|record| serde_json::to_string(record).unwrap()).collect();
        std::fs::write(file.path(), lines.join("\n")).unwrap();
        assert_eq!(read(file.path()).unwrap(), records);
        assert!(read(Path::new("/nowhere/drill.jsonl")).unwrap().is_empty());
    }

    #[test]
    fn whatever_a_client_noticed_is_found() {
        for noticed in [
            Noticed { changed: 1, ..Noticed::default() },
            Noticed { hung: 1, ..Noticed::default() },
            Noticed { errors: vec!["503".into()], ..Noticed::default() },
        ] {
            let record = record("node-0", Kind::Kill, noticed);
            assert!(!Report::of(std::slice::from_ref(&record)).is_clean());
            assert!(record.line(0).contains("CHANGED"), "{}", record.line(0));
        }
    }
}
