//! How many threads compute, and on which cores.

use crate::config::{NodeConfig, Pin};
use ashlar_kernels::{Isa, Kernels, PinError, ThreadPool, available_cores, available_threads};
use tracing::{info, warn};

/// Why a node's threads cannot be as configured.
#[derive(Debug, thiserror::Error)]
pub enum ThreadsError {
    /// An unknown or unavailable instruction set.
    #[error("isa `{0}` is unknown or not available on this machine: use avx512, avx512bw, avx2 or portable")]
    Isa(String),
    /// A core twice, or fewer cores than threads.
    #[error("`pin` names {cores} different cores for {threads} threads: name one for each")]
    Cores {
        /// Different cores.
        cores: usize,
        /// Threads.
        threads: usize,
    },
    /// A core that is not this process's.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// Whether a node's threads can be as configured, and what is to be said about it; starts none.
///
/// # Errors
/// [`ThreadsError`].
pub fn check(config: &NodeConfig) -> Result<Vec<String>, ThreadsError> {
    Ok(chosen(config)?.1.warnings)
}

fn chosen(config: &NodeConfig) -> Result<(Isa, Layout), ThreadsError> {
    let isa = match &config.isa {
        None => Isa::best(),
        Some(name) => match name.parse::<Isa>() {
            Ok(isa) if isa.is_available() => isa,
            _ => return Err(ThreadsError::Isa(name.clone())),
        },
    };
    Ok((isa, layout(config.threads, &config.pin, &available_cores(), available_threads())?))
}

/// The kernels of a node, on their threads.
pub(crate) fn kernels(config: &NodeConfig) -> Result<Kernels, ThreadsError> {
    let (isa, layout) = chosen(config)?;
    layout.warnings.iter().for_each(|warning| warn!("{warning}"));
    let pool = match &layout.cores {
        Some(cores) => {
            info!(?cores, "one thread on each core");
            ThreadPool::on_cores(cores)?
        }
        None => ThreadPool::new(layout.threads),
    };
    Ok(Kernels::on_pool(isa, pool))
}

/// Threads, and a core for each of them if they are to be pinned.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    threads: usize,
    cores: Option<Vec<usize>>,
    warnings: Vec<String>,
}

/// What follows from the configuration, the cores that this process may use, and how many of them a quota leaves it.
fn layout(
    threads: Option<usize>,
    pin: &Pin,
    cores: &[usize],
    available: usize,
) -> Result<Layout, ThreadsError> {
    let mut warnings = Vec::new();
    let named = match pin {
        Pin::Cores(named) => Some(named),
        Pin::Each(_) => None,
    };
    let threads = threads.or(named.map(Vec::len)).unwrap_or(available).max(1);
    if threads > available {
        warnings.push(format!(
            "{threads} compute threads are more than the {available} that this process may use (cores, affinity and \
             control groups' quotas count): they will wait for one another; lower `threads`"
        ));
    }
    let chosen = match pin {
        Pin::Each(false) => None,
        Pin::Each(true) if cores.len() < threads => {
            warnings.push(format!(
                "threads are not pinned: there are {threads}, and this process can choose among {} cores",
                cores.len()
            ));
            None
        }
        Pin::Each(true) => Some(cores[..threads].to_vec()),
        Pin::Cores(named) => {
            let mut different = named.clone();
            different.sort_unstable();
            different.dedup();
            if different.len() < threads || different.len() < named.len() {
                return Err(ThreadsError::Cores { cores: different.len(), threads });
            }
            Some(named[..threads].to_vec())
        }
    };
    Ok(Layout { threads, cores: chosen, warnings })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const CORES: [usize; 4] = [2, 3, 6, 7];

    fn chosen(threads: Option<usize>, pin: Pin) -> (usize, Option<Vec<usize>>, usize) {
        let layout = layout(threads, &pin, &CORES, 3).unwrap();
        (layout.threads, layout.cores, layout.warnings.len())
    }

    #[test]
    fn threads_follow_what_the_process_may_use_and_pins_follow_its_cores() {
        assert_eq!(chosen(None, Pin::Each(false)), (3, None, 0));
        assert_eq!(chosen(Some(2), Pin::Each(false)), (2, None, 0));
        assert_eq!(chosen(None, Pin::Each(true)), (3, Some(vec![2, 3, 6]), 0));
        assert_eq!(chosen(None, Pin::Cores(vec![7, 2])), (2, Some(vec![7, 2]), 0));
        assert_eq!(chosen(Some(1), Pin::Cores(vec![7, 2])), (1, Some(vec![7]), 0));
    }

    #[test]
    fn more_threads_than_the_quota_are_warned_about_and_more_than_the_cores_are_not_pinned() {
        assert_eq!(chosen(Some(4), Pin::Each(false)), (4, None, 1));
        assert_eq!(chosen(Some(4), Pin::Each(true)), (4, Some(CORES.to_vec()), 1));
        assert_eq!(chosen(Some(5), Pin::Each(true)), (5, None, 2));
        assert!(matches!(
            layout(Some(3), &Pin::Cores(vec![2, 3]), &CORES, 3),
            Err(ThreadsError::Cores { cores: 2, threads: 3 })
        ));
        assert!(layout(None, &Pin::Cores(vec![2, 2]), &CORES, 3).is_err());
    }
}
