//! Threads, and what is measured on them.

use ashlar_kernels::measure::{QuantizedProduct, fma_flops_per_s, read_bandwidth_bytes_per_s};
use ashlar_kernels::{Isa, Kernels, ThreadPool, YieldFlag};
use ashlar_vocabulary::WeightType;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn every_task_runs_once_for_any_number_of_threads() {
    for threads in 1..=4 {
        let pool = ThreadPool::new(threads);
        for tasks in [0, 1, 2, 7, 100] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..20 {
                pool.run(tasks, &|task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 20));
        }
    }
}

#[test]
fn a_panicking_task_reaches_the_caller_and_the_pool_stays_usable() {
    let pool = ThreadPool::new(3);
    for _ in 0..5 {
        let caught =
            catch_unwind(AssertUnwindSafe(|| pool.run(16, &|task| assert!(task != 11, "task eleven"))));
        let payload = caught.expect_err("the panic must arrive");
        assert_eq!(payload.downcast_ref::<&str>(), Some(&"task eleven"));
        let ran = AtomicUsize::new(0);
        pool.run(9, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 9);
    }
}

#[test]
fn nested_jobs_and_several_callers_finish() {
    let pool = ThreadPool::new(2);
    let ran = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..50 {
                    pool.run(4, &|_| {
                        pool.run(4, &|_| {
                            ran.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                }
            });
        }
    });
    assert_eq!(ran.into_inner(), 3 * 50 * 16);
}

#[test]
fn sleeping_workers_wake_for_the_next_job() {
    let pool = ThreadPool::new(2);
    for _ in 0..20 {
        // Long enough for the worker to go to sleep, most of the time.
        thread::sleep(Duration::from_micros(300));
        let (begun, both) = (Mutex::new(0), Condvar::new());
        pool.run(2, &|_| {
            let mut count = lock(&begun);
            *count += 1;
            both.notify_all();
            // One thread that takes both tasks would wait for itself.
            let wait = both.wait_timeout_while(count, Duration::from_secs(30), |count| *count < 2);
            let (count, waited) = wait.unwrap_or_else(PoisonError::into_inner);
            drop(count);
            assert!(!waited.timed_out(), "the other thread slept on");
        });
    }
}

#[test]
fn background_work_stops_between_tasks_while_the_flag_is_raised() {
    for threads in [1, 3] {
        let flag = YieldFlag::default();
        let pool = ThreadPool::in_background(threads, flag.clone());
        let done = AtomicUsize::new(0);
        thread::scope(|scope| {
            let urgent = flag.raise();
            let also = flag.raise();
            let running = scope.spawn(|| {
                pool.run(8, &|_| {
                    done.fetch_add(1, Ordering::Relaxed);
                });
            });
            thread::sleep(Duration::from_millis(30));
            drop(also);
            thread::sleep(Duration::from_millis(30));
            assert_eq!(done.load(Ordering::Relaxed), 0, "the flag was raised");
            drop(urgent);
            let lowered = Instant::now();
            while !running.is_finished() {
                assert!(lowered.elapsed() < Duration::from_secs(10), "nobody went on");
                thread::sleep(Duration::from_millis(1));
            }
        });
        assert_eq!(done.into_inner(), 8);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn only_background_threads_have_the_lowest_priority() {
    let pool = ThreadPool::in_background(2, YieldFlag::default());
    let priorities = std::sync::Mutex::new(std::collections::BTreeMap::new());
    let caller = thread::current().id();
    // Tasks long enough that both threads take some.
    pool.run(64, &|_| {
        thread::sleep(Duration::from_millis(1));
        let priority = rustix::process::getpriority_process(None).unwrap_or(0);
        let is_caller = thread::current().id() == caller;
        priorities.lock().unwrap_or_else(|e| e.into_inner()).insert(is_caller, priority);
    });
    let own = rustix::process::getpriority_process(None).unwrap_or(0);
    let priorities = priorities.into_inner().unwrap_or_else(|e| e.into_inner());
    assert_eq!((priorities.get(&false), priorities.get(&true)), (Some(&19), Some(&own)));
}

#[test]
fn names_round_trip_and_portable_always_runs() {
    for isa in Isa::ALL {
        assert_eq!(isa.to_string().parse(), Ok(isa));
    }
    assert!("sse9".parse::<Isa>().is_err());
    assert_eq!(Isa::available().last(), Some(&Isa::Portable));
}

#[test]
fn measurements_are_positive_and_take_about_their_time() {
    let kernels = Kernels::new(Isa::best(), 1);
    let start = Instant::now();
    assert!(read_bandwidth_bytes_per_s(&kernels, 1 << 20, Duration::from_millis(5)) > 1e8);
    assert!(fma_flops_per_s(&kernels, Duration::from_millis(5)) > 1e8);
    for kind in [WeightType::Q8_0, WeightType::Q4K] {
        let mut product = QuantizedProduct::new(&kernels, kind);
        assert!(product.flops_per_s(&kernels, Duration::from_millis(5)) > 1e8);
    }
    assert!(start.elapsed() < Duration::from_secs(2));
}
