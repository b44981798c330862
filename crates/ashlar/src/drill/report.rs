//! What a drill came to.

use super::fault::{Kind, Role};
use super::jobs;
use super::load::Noticed;
use crate::bench::stats::percentile;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// One fault.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct FaultRecord {
    process: String,
    kind: Kind,
    /// From the fault until the cluster's view showed that something was missing; `None` where it never did, or was not asked.
    #[serde(default)]
    seen_s: Option<f64>,
    /// From the fault until the cluster was as it should be.
    recovered_s: f64,
    #[serde(flatten)]
    noticed: Noticed,
    /// Where jobs ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    jobs: Option<jobs::Noticed>,
}

/// What was noticed after the last fault of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Rest {
    #[serde(rename = "after_the_last")]
    pub(super) noticed: Noticed,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) jobs: Option<jobs::Noticed>,
}

impl FaultRecord {
    pub(super) fn new(
        process: &str,
        kind: Kind,
        recovered: Duration,
        noticed: Noticed,
        jobs: Option<jobs::Noticed>,
    ) -> FaultRecord {
        let recovered_s = recovered.as_secs_f64();
        FaultRecord { process: process.to_owned(), kind, seen_s: None, recovered_s, noticed, jobs }
    }

    /// The cluster's view showed it so long after it began.
    pub(super) fn seen(self, after: Option<Duration>) -> FaultRecord {
        FaultRecord { seen_s: after.map(|after| after.as_secs_f64()), ..self }
    }

    /// What was noticed afterwards.
    pub(super) fn add(&mut self, rest: Rest) {
        self.noticed.add(rest.noticed);
        if let Some(rest) = rest.jobs {
            self.jobs.get_or_insert_default().add(rest);
        }
    }

    /// The adapter of the undisturbed job, where jobs ran.
    pub(super) fn adapter(&self) -> Option<&str> {
        self.jobs.as_ref().map(|jobs| jobs.adapter.as_str())
    }

    fn longest_stall_s(&self) -> f64 {
        self.noticed.stalls_s.iter().copied().fold(0.0, f64::max)
    }

    /// For people who watch.
    pub(super) fn line(&self, number: usize) -> String {
        let noticed = &self.noticed;
        let mut line = format!(
            "{:>4}  {:<9} {:<10} longest stall {:.2} s, whole after {:.2} s",
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
        if let Some(jobs) = self.jobs.as_ref().filter(|jobs| **jobs != jobs::Noticed::default()) {
            line += &format!(", {} jobs finished, {:.1} s without a step", jobs.finished, jobs.longest_gap_s);
            if !jobs.is_clean() {
                line +=
                    &format!("; JOBS CHANGED {}, HUNG {}, FAILED {:?}", jobs.changed, jobs.hung, jobs.failed);
            }
        }
        if noticed.changed + noticed.hung > 0 || !noticed.errors.is_empty() {
            line +=
                &format!("; CHANGED {}, HUNG {}, ERRORS {:?}", noticed.changed, noticed.hung, noticed.errors);
        }
        line
    }
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
    /// Where any ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    jobs: Option<jobs::Noticed>,
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
    /// Of the faults that the cluster's view showed.
    #[serde(skip_serializing_if = "Option::is_none")]
    seen_p50_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seen_max_s: Option<f64>,
    recovery_p50_s: f64,
    recovery_max_s: f64,
}

impl Report {
    pub(super) fn of(records: &[FaultRecord]) -> Report {
        let sum = |field: fn(&Noticed) -> u64| records.iter().map(|record| field(&record.noticed)).sum();
        let mut by_fault = Vec::new();
        for role in Role::ALL {
            for kind in Kind::ALL {
                let same = |record: &&FaultRecord| Role::of(&record.process) == role && record.kind == kind;
                by_fault.extend(Row::of(role, kind, &records.iter().filter(same).collect::<Vec<_>>()));
            }
        }
        let mut jobs = None;
        for of_fault in records.iter().filter_map(|record| record.jobs.as_ref()) {
            jobs.get_or_insert_with(jobs::Noticed::default).add(of_fault.clone());
        }
        Report {
            faults: records.len(),
            completed: sum(|noticed| noticed.completed),
            cut_off_with_their_gateway: sum(|noticed| noticed.cut),
            resumed: sum(|noticed| noticed.resumed),
            changed: sum(|noticed| noticed.changed),
            hung: sum(|noticed| noticed.hung),
            errors: records.iter().map(|record| record.noticed.errors.len()).sum(),
            jobs,
            by_fault,
        }
    }

    /// Whether no client noticed more than a pause, and every job came to the same.
    pub(super) fn is_clean(&self) -> bool {
        let streams = self.changed == 0 && self.hung == 0 && self.errors == 0;
        streams && self.jobs.as_ref().is_none_or(jobs::Noticed::is_clean)
    }
}

impl Row {
    fn of(role: Role, kind: Kind, records: &[&FaultRecord]) -> Option<Row> {
        let stalls: Vec<f64> =
            records.iter().flat_map(|record| record.noticed.stalls_s.iter().copied()).collect();
        let recoveries: Vec<f64> = records.iter().map(|record| record.recovered_s).collect();
        let seen: Vec<f64> = records.iter().filter_map(|record| record.seen_s).collect();
        let max = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        (!records.is_empty()).then(|| Row {
            role,
            kind,
            faults: records.len(),
            stall_p50_s: percentile(&stalls, 50.0),
            stall_p99_s: percentile(&stalls, 99.0),
            stall_max_s: max(&stalls),
            seen_p50_s: (!seen.is_empty()).then(|| percentile(&seen, 50.0)),
            seen_max_s: (!seen.is_empty()).then(|| max(&seen)),
            recovery_p50_s: percentile(&recoveries, 50.0),
            recovery_max_s: max(&recoveries),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "role       fault      faults   stall p50    p99    max   seen p50    max   whole again p50    max   (seconds)"
        )?;
        let seen = |time: Option<f64>| time.map_or_else(|| "-".to_owned(), |time| format!("{time:.2}"));
        for row in &self.by_fault {
            writeln!(
                f,
                "{:<10} {:<10} {:>6} {:>11.2} {:>6.2} {:>6.2} {:>10} {:>6} {:>17.2} {:>6.2}",
                format!("{:?}", row.role).to_lowercase(),
                row.kind.word(),
                row.faults,
                row.stall_p50_s,
                row.stall_p99_s,
                row.stall_max_s,
                seen(row.seen_p50_s),
                seen(row.seen_max_s),
                row.recovery_p50_s,
                row.recovery_max_s
            )?;
        }
        if let Some(jobs) = &self.jobs {
            writeln!(
                f,
                "{} jobs finished with the adapter of an undisturbed one ({}); {} changed, {} hung, {} failed; at most {:.1} s \
                 without a committed step",
                jobs.finished,
                jobs.adapter,
                jobs.changed,
                jobs.hung,
                jobs.failed.len(),
                jobs.longest_gap_s
            )?;
            for why in &jobs.failed {
                writeln!(f, "  a job failed: {why}")?;
            }
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
    use super::*;

    fn record(process: &str, kind: Kind, noticed: Noticed) -> FaultRecord {
        FaultRecord::new(process, kind, Duration::from_millis(500), noticed, None)
    }

    #[test]
    fn faults_are_told_apart() {
        let stalled =
            |stalls_s: &[f64]| Noticed { stalls_s: stalls_s.to_vec(), completed: 2, ..Noticed::default() };
        let records = [
            record("node-0", Kind::Kill, stalled(&[0.1, 0.3])),
            record("node-1", Kind::Kill, stalled(&[0.2, 0.4])),
            record("scheduler", Kind::Freeze, stalled(&[1.0, 1.2])).seen(Some(Duration::from_secs(1))),
            record("scheduler", Kind::Freeze, stalled(&[1.0, 1.2])),
            record("gateway", Kind::Partition, stalled(&[1.0, 1.2])),
        ];
        let report = Report::of(&records);
        assert!(report.is_clean());
        assert_eq!((report.faults, report.completed, report.by_fault.len()), (5, 10, 3));
        assert_eq!((report.by_fault[0].faults, report.by_fault[0].stall_max_s), (2, 0.4));
        assert_eq!((report.by_fault[0].seen_max_s, report.by_fault[1].seen_max_s), (None, Some(1.0)));
        assert!(report.to_string().contains("gateway    partition       1"), "{report}");
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

    #[test]
    fn whatever_became_of_jobs_is_found_even_after_the_last_fault() {
        let good = jobs::Noticed { finished: 2, longest_gap_s: 1.5, ..jobs::Noticed::default() };
        for bad in [
            jobs::Noticed { changed: 1, ..good.clone() },
            jobs::Noticed { hung: 1, ..good.clone() },
            jobs::Noticed { failed: vec!["no room".into()], ..good.clone() },
        ] {
            let mut record = record("node-0", Kind::Mute, Noticed::default());
            record.add(Rest { noticed: Noticed::default(), jobs: Some(good.clone()) });
            assert!(Report::of(std::slice::from_ref(&record)).is_clean());
            record.add(Rest { noticed: Noticed::default(), jobs: Some(bad) });
            let report = Report::of(std::slice::from_ref(&record));
            assert!(!report.is_clean() && record.line(0).contains("JOBS CHANGED"), "{report}");
            assert!(report.to_string().contains("4 jobs finished"), "{report}");
        }
    }
}
