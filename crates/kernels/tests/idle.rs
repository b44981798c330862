//! A pool without work costs nothing. The only test of its process: it measures the whole process.
#![cfg(target_os = "linux")]

use ashlar_kernels::ThreadPool;
use rustix::time::{ClockId, clock_gettime};
use std::thread;
use std::time::{Duration, Instant};

/// What all threads of this process have computed.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn an_idle_pool_uses_no_processor_time() {
    const WINDOW: Duration = Duration::from_millis(500);
    // One of the system's clock ticks: what this thread's own looks and the test runner may take.
    const LITTLE: Duration = Duration::from_millis(10);
    const PATIENCE: Duration = Duration::from_secs(10);
    let pool = ThreadPool::new(4);
    for _ in 0..100 {
        pool.run(64, &|_| (0..1000).for_each(|_| std::hint::spin_loop()));
    }
    let began = Instant::now();
    loop {
        let before = processor_time();
        // A window of observation, nothing waits for its end.
        thread::sleep(WINDOW);
        let spent = processor_time() - before;
        if spent <= LITTLE {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "an idle pool still computes: {spent:?} in {WINDOW:?}");
    }
}
