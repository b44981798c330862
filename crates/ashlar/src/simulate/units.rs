//! Figures as people write them.

use crate::drill::Role;
use clap::ValueEnum;

/// What happens to a process of the simulated cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// It is gone.
    Kill,
    /// It stands still for a while.
    Freeze,
}

/// A fault at a chosen moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Fault {
    pub(crate) role: Role,
    pub(crate) index: usize,
    pub(crate) kind: Kind,
    pub(crate) at_s: f64,
}

/// `10m`, `90s`, `1.5h`, `200ms`, or plain seconds.
pub(crate) fn parse_seconds(text: &str) -> Result<f64, String> {
    let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let (number, factor) = units
        .into_iter()
        .find_map(|(unit, factor)| text.strip_suffix(unit).map(|number| (number, factor)))
        .unwrap_or((text, 1.0));
    match number.trim().parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value * factor),
        _ => Err(format!("`{text}` is no time: write for example 10m or 90s")),
    }
}

/// `40GB/s`, `300G`, `1.5TFLOP/s`, `2GiB/s`, or a plain number per second.
pub(crate) fn parse_rate(text: &str) -> Result<f64, String> {
    let bare =
        ["/s", "FLOP", "B", "i"].iter().fold(text.trim(), |rest, end| rest.strip_suffix(end).unwrap_or(rest));
    let binary = text.contains("iB");
    let units = [("k", 1), ("K", 1), ("M", 2), ("G", 3), ("T", 4)];
    let (number, power) = units
        .into_iter()
        .find_map(|(unit, power)| bare.strip_suffix(unit).map(|number| (number, power)))
        .unwrap_or((bare, 0));
    let factor = if binary { 1024f64 } else { 1000f64 }.powi(power);
    match number.trim().parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value * factor),
        _ => Err(format!("`{text}` is no speed: write for example 40GB/s or 300G")),
    }
}

pub(crate) fn positive(text: &str) -> Result<f64, String> {
    not_negative(text).and_then(|value| match value > 0.0 {
        true => Ok(value),
        false => Err(format!("`{text}` must be more than 0")),
    })
}

pub(crate) fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(value),
        _ => Err(format!("`{text}` is no number from 0")),
    }
}

/// `node:0:kill@30s`, `scheduler:0:freeze@1m`.
pub(crate) fn parse_fault(text: &str) -> Result<Fault, String> {
    let usage = || format!("`{text}` is no fault: write for example node:0:kill@30s");
    let (who, at) = text.split_once('@').ok_or_else(usage)?;
    let parts: Vec<&str> = who.split(':').collect();
    let [role, index, kind] = parts[..] else { return Err(usage()) };
    let role = match role {
        "node" => Role::Node,
        "scheduler" => Role::Scheduler,
        "gateway" => Role::Gateway,
        _ => return Err(usage()),
    };
    let kind = match kind {
        "kill" => Kind::Kill,
        "freeze" => Kind::Freeze,
        _ => return Err(usage()),
    };
    Ok(Fault { role, index: index.parse().map_err(|_| usage())?, kind, at_s: parse_seconds(at)? })
}
