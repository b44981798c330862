//! Time for the shells around pure cores: a number of milliseconds that never goes back.

use serde::{Deserialize, Serialize};
use std::ops::{Add, Sub};
use std::time::{Duration, Instant};

/// Milliseconds since a clock's own start. Two clocks cannot be compared.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Millis(pub u64);

impl Millis {
    /// The time from `earlier` to here; zero if it is later.
    pub fn since(self, earlier: Millis) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Millis {
    type Output = Millis;
    fn add(self, duration: Duration) -> Millis {
        Millis(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl Sub for Millis {
    type Output = Duration;
    fn sub(self, earlier: Millis) -> Duration {
        self.since(earlier)
    }
}

/// A source of time that never goes back.
pub trait Clock: Send + Sync + 'static {
    /// Now.
    fn now(&self) -> Millis;
}

/// The system's monotonic clock. On Linux it is CLOCK_BOOTTIME, which runs on while the machine is suspended, so that a
/// lease has ended when its holder wakes up; elsewhere the standard library's [`Instant`], which may stand still then. A
/// change of the wall clock moves neither.
#[derive(Debug, Clone)]
pub struct SystemClock {
    /// Reading at the start.
    start: Duration,
}

impl Default for SystemClock {
    fn default() -> SystemClock {
        SystemClock::new()
    }
}

impl SystemClock {
    /// A clock that starts at 0 now.
    pub fn new() -> SystemClock {
        SystemClock { start: reading() }
    }

    /// Time since the start, finer than [`Millis`].
    pub fn elapsed(&self) -> Duration {
        reading().saturating_sub(self.start)
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Millis {
        Millis(0) + self.elapsed()
    }
}

#[cfg(target_os = "linux")]
fn reading() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(not(target_os = "linux"))]
fn reading() -> Duration {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// The [`Instant`] at which `clock` reaches `due`, for timers that take one.
pub fn instant_of(clock: &impl Clock, due: Millis) -> Instant {
    Instant::now() + due.since(clock.now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_clock_starts_at_zero_and_never_goes_back() {
        let clock = SystemClock::new();
        assert!(clock.now() < Millis(1000));
        let mut last = clock.elapsed();
        for _ in 0..10_000 {
            let now = clock.elapsed();
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Millis(5) - Millis(9), Duration::ZERO);
        assert_eq!(Millis(u64::MAX) + Duration::from_secs(1), Millis(u64::MAX));
        assert_eq!(Millis(9) - Millis(5), Duration::from_millis(4));
    }
}
