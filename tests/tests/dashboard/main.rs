//! The dashboard in a real browser: every page and what can be done on it, as an operator does it, with the keyboard and on a phone, too.
//!
//! Skipped where Chromium and its driver are not installed. Screenshots are kept (see [`Browser::screenshot`]).
//!
//! Layout: here what all tests share, the pages, the cluster and the playground; [`tuning`] (jobs), [`models`] (models and adapters),
//! [`api_keys`].

mod api_keys;
mod models;
mod tuning;

use ashlar_tests::browser::{SIGHT_LIMIT, keys};
use ashlar_tests::tuning::examples;
use ashlar_tests::{Browser, Cluster, http, processes, until};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tempfile::TempDir;

/// Most bytes of a page with all its files, uncompressed.
const PAGE_BYTES_MAX: f64 = 200_000.0;
const PAGES: [(&str, &str); 6] = [
    ("cluster", "Cluster"),
    ("requests", "Requests"),
    ("models", "Models"),
    ("chat", "Chat"),
    ("tuning", "Fine-tuning"),
    ("keys", "Keys"),
];

/// One browser at a time: each takes as much of the machine as a cluster.
static TURN: Mutex<()> = Mutex::new(());

/// A cluster, and a browser that looks at it.
struct World {
    browser: Browser,
    cluster: Cluster,
    files: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    /// `None` where there is no browser; says so.
    #[track_caller]
    fn closed(test: &str, args: &[&str]) -> Option<World> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let browser = Browser::start(test)?;
        let files = tempfile::tempdir().expect("a directory");
        Some(World { browser, cluster: Cluster::start(args), files, _turn: turn })
    }

    /// The same, with the first page open.
    #[track_caller]
    fn open(test: &str, args: &[&str]) -> Option<World> {
        let world = World::closed(test, args)?;
        // Again where a file did not arrive, as the machine's networks changed meanwhile.
        let ready = "Boolean(document.querySelector('#link')?.textContent.includes('✓ ready'))";
        let seen = until(SIGHT_LIMIT, || {
            world.browser.open("about:blank");
            world.go("cluster");
            until(SIGHT_LIMIT / 6, || (world.browser.eval(ready) == true).then_some(()))
        });
        assert!(seen.is_some(), "the dashboard does not come up");
        Some(world)
    }

    #[track_caller]
    fn go(&self, page: &str) {
        self.browser.open(&format!("http://{}/#/{page}", self.cluster.address()));
    }

    /// A file for the browser to upload.
    #[track_caller]
    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.files.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path
    }

    #[track_caller]
    fn upload(&self, name: &str, text: &str) {
        let path = self.file(name, text);
        self.browser.type_into("#job-file", path.to_str().expect("a path"));
    }
}

#[test]
fn pages_load_small_and_quiet_in_light_and_dark_on_a_phone_and_by_keyboard() {
    let Some(world) = World::open("the dashboard's pages", &[]) else { return };
    let browser = &world.browser;
    for (page, title) in PAGES {
        // Anew, and so with all that it takes.
        browser.open("about:blank");
        world.go(page);
        browser.await_that(&format!("document.querySelector('h1')?.textContent === '{title}'"));
        let heading = browser.eval("document.title");
        assert!(heading.as_str().is_some_and(|heading| heading.ends_with(" · Ashlar")), "{heading}");
        let bytes = browser.eval(
            "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]\
             .filter((one) => new URL(one.name).pathname === '/' || one.name.includes('/dashboard/'))\
             .reduce((sum, one) => sum + one.decodedBodySize, 0)",
        );
        let bytes = bytes.as_f64().expect("a number");
        println!("{page}: {bytes} bytes");
        assert!((20_000.0..PAGE_BYTES_MAX).contains(&bytes), "{page} takes {bytes} bytes");
    }
    let policy = world.cluster.get("/");
    let policy = policy.header("content-security-policy").unwrap_or_default();
    assert!(policy.contains("default-src 'none'") && policy.contains("script-src 'self'"), "{policy}");

    for width in [360, 390] {
        browser.resize(width, 844, true);
        for (page, _) in PAGES {
            world.go(page);
            browser.await_that("document.querySelector('main').innerText.length > 20");
            let wide = browser.eval("document.documentElement.scrollWidth");
            assert!(wide.as_u64() <= Some(u64::from(width)), "{page} is {wide} wide on a phone of {width}");
            browser.screenshot(&format!("phone-{width}-{page}"));
        }
    }
    browser.resize(1280, 860, false);

    let ground = || browser.eval("getComputedStyle(document.body).backgroundColor");
    browser.prefer("light");
    let light = ground();
    browser.prefer("dark");
    let dark = ground();
    assert_ne!(light, dark);
    browser.screenshot("dark-tuning");
    browser.click("#theme");
    assert_eq!(ground(), light, "a chosen theme is stronger than the system's");
    browser.reload();
    browser.await_that("document.querySelector('h1')");
    assert_eq!(ground(), light, "a chosen theme is remembered");
    browser.click("#theme");
    browser.click("#theme");
    browser.prefer("light");

    world.go("cluster");
    browser.reload();
    browser.await_that("document.querySelectorAll('[data-node]').length === 2");
    browser.keys(&[keys::TAB]);
    assert_eq!(browser.eval("document.activeElement.className"), "skip");
    browser.keys(&[keys::TAB, keys::TAB, keys::RIGHT, keys::RIGHT, keys::LEFT, keys::RIGHT, keys::ENTER]);
    browser.await_that("document.querySelector('[data-model]')");
    assert_eq!(browser.eval("location.hash"), "#/models");
    browser.eval("document.querySelector('.head-actions button').focus()");
    browser.keys(&[keys::ENTER]);
    browser.await_that("document.querySelector('dialog[open]')");
    browser.keys(&[keys::ESCAPE]);
    browser.await_that("!document.querySelector('dialog')");
    assert_eq!(
        browser.eval("document.activeElement.textContent"),
        "Deploy a model…",
        "the focus goes back to where the dialog was opened"
    );
    assert_eq!(browser.console_errors(), Vec::<String>::new());
}

/// Health of a node as the picture has it.
fn health(node: &str) -> String {
    format!("document.querySelector('[data-node=\"{node}\"]')?.dataset.health")
}

#[test]
fn the_picture_shows_nodes_and_sees_them_go_come_back_and_drain() {
    let test = "the picture of the cluster";
    let Some(world) = World::open(test, &["--replicas", "2", "--nodes", "5", "--threads", "1"]) else {
        return;
    };
    let (browser, cluster) = (&world.browser, &world.cluster);
    // Which one stands by is decided by how fast each was when it was measured.
    browser.await_that("document.querySelectorAll('[data-health=ready]').length === 4");
    browser.await_that("document.querySelectorAll('[data-health=standby]').length === 1");
    browser.await_that("document.querySelectorAll('[data-link]').length === 2");
    browser.await_that(
        "[...document.querySelectorAll('.node-layers')].some((one) => one.textContent === 'layers 2–3')",
    );
    browser.await_text("2 of 2 replicas serve");
    browser.screenshot("cluster");

    // One that hangs: silence is what shows it.
    assert!(processes::signal(cluster.pid("node-3"), "STOP"));
    browser.await_that(&format!("{} === 'lost'", health("node-3")));
    browser.await_text("node-3 is lost");
    browser.screenshot("cluster-lost");
    assert!(processes::signal(cluster.pid("node-3"), "CONT"));
    browser.await_that(&format!("['ready', 'standby'].includes({})", health("node-3")));
    browser.await_text("node-3 is back");

    // One that dies and is back before anybody could look: the log has it all the same.
    assert!(processes::signal(cluster.pid("node-0"), "KILL"));
    browser.await_that(
        "[...document.querySelectorAll('.log li')].some((one) => /node-0 (is lost|was away)/.test(one.textContent))",
    );
    browser.await_that(&format!("['ready', 'standby'].includes({})", health("node-0")));
    browser.await_text("2 of 2 replicas serve");
    browser.screenshot("cluster-back");

    // The details of a node that serves, and what would become of the layout without it.
    let serves =
        "[...document.querySelectorAll('[data-health=ready]')].map((one) => one.dataset.node).sort()[0]";
    let node = browser.eval(serves);
    let node = node.as_str().expect("a node that serves");
    browser.click(&format!("[data-node=\"{node}\"] button"));
    browser.await_that("document.querySelector('dialog.node-sheet')?.innerText.includes('reserved in all')");
    browser.screenshot("cluster-node");
    browser.keys(&[keys::ESCAPE]);
    let drain = format!("[data-row=\"{node}\"] .cell-action button:not([hidden])");
    browser.click(&drain);
    browser.await_text("Standbys load its layers and take its place.");
    browser.await_text(&format!("Without {node}:"));
    browser.screenshot("cluster-drain");
    browser.keys(&[keys::ESCAPE]);
    browser.await_that("!document.querySelector('dialog')");
    let leaving = |cluster: &Cluster| {
        let view = cluster.view();
        let mut nodes = view["nodes"].as_array().into_iter().flatten();
        nodes.any(|one| one["leaving"] == true)
    };
    assert!(!leaving(cluster), "a preview changes nothing");
    browser.click(&drain);
    browser.await_that("document.querySelector('.plan-change')");
    browser.press(&format!("Drain {node}"));
    browser.await_that(&format!("{} === 'drained'", health(node)));
    browser.screenshot("cluster-drained");
    browser.press("Use again");
    browser.await_that(&format!("['ready', 'standby'].includes({})", health(node)));

    // As it would be planned from nothing: measured speeds decide whether that is another layout.
    browser.press("Re-plan…");
    browser.await_that("document.querySelector('dialog .plan-change')");
    assert_eq!(browser.eval("document.querySelectorAll('dialog .plan-rank').length"), 4);
    browser.screenshot("cluster-replan");
    let disabled = "[...document.querySelectorAll('dialog button')].find((one) => one.textContent === 'Lay it out anew').disabled";
    if browser.eval("document.querySelector('dialog .plan-change').textContent")
        == "✓ It is laid out so already."
    {
        assert_eq!(browser.eval(disabled), true);
        browser.keys(&[keys::ESCAPE]);
    } else {
        browser.await_that(&format!("!{disabled}"));
        browser.press("Lay it out anew");
    }
    browser.await_that("!document.querySelector('dialog')");
    browser.await_text("2 of 2 replicas serve");
    assert_eq!(browser.console_errors(), Vec::<String>::new());
}

/// Records, for as long as the page is there, tasks that hold it up, how far frames are apart, and answers of the cluster.
const WATCH: &str = "window.seen = {tasks: [], frames: [], answers: 0, last: performance.now()};\
    new PerformanceObserver((list) => { for (const one of list.getEntries()) seen.tasks.push(one.duration); }).observe({type: 'longtask'});\
    new PerformanceObserver((list) => { seen.answers += list.getEntries().filter((one) => one.name.endsWith('/admin/cluster')).length; })\
        .observe({type: 'resource'});\
    (function frame(now) { seen.frames.push(now - seen.last); seen.last = now; requestAnimationFrame(frame); })(performance.now());";

#[test]
fn the_page_stays_usable_at_ten_updates_a_second_under_load() {
    let Some(world) = World::open("ten updates a second", &[]) else { return };
    let (browser, address) = (&world.browser, world.cluster.address().to_owned());
    browser.eval("localStorage.setItem('ashlar.every_ms', '100')");
    browser.reload();
    browser.await_that("document.querySelectorAll('[data-node]').length === 2");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let body = json!({"prompt": "Write", "max_tokens": 200, "ignore_eos": true, "temperature": 1, "n": 4})
        .to_string();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    http::post(&address, "/v1/completions", body.as_bytes()).expect("an answer");
                }
            });
        }
        browser.script(WATCH, &[]);
        browser.await_within(2 * SIGHT_LIMIT, "seen.answers >= 60");
        let opened = std::time::Instant::now();
        browser.click("[data-node] button");
        browser.await_that("document.querySelector('dialog.node-sheet')");
        println!("a dialog was there after {} ms", opened.elapsed().as_millis());
        browser.keys(&[keys::ESCAPE]);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let seen = browser.eval(
        "(() => { const frames = seen.frames.toSorted((a, b) => a - b); const at = (share) => frames[Math.floor(share * (frames.length - 1))];\
           return {answers: seen.answers, seconds: frames.reduce((a, b) => a + b) / 1000, long_tasks: seen.tasks.length,\
           longest_task_ms: Math.max(0, ...seen.tasks), frame_p50_ms: at(0.5), frame_p99_ms: at(0.99)}; })()",
    );
    println!("{seen}");
    let rate = seen["answers"].as_f64().expect("a count") / seen["seconds"].as_f64().expect("seconds");
    // How fast that is depends on what else the machine does.
    assert!(rate > 1.0, "it keeps asking: {seen}");
    assert!(seen["longest_task_ms"].as_f64() < Some(2_000.0), "nothing holds the page up: {seen}");
    assert_eq!(browser.console_errors(), Vec::<String>::new());
}

#[test]
fn a_chat_streams_side_by_side_and_as_code_and_its_requests_have_receipts() {
    let Some(world) = World::open("the playground", &[]) else { return };
    let browser = &world.browser;
    world.go("chat");
    browser.await_that("document.querySelector('.picker')?.value === 'ashlar-demo'");
    browser.type_into("#chat-temperature", "0");
    browser.type_into("#chat-seed", "7");
    browser.eval(
        "window.lengths = new Set(), new MutationObserver(() => window.lengths.add(document.querySelector('.answer-text')?.textContent.length))\
         .observe(document.querySelector('.messages'), {subtree: true, childList: true, characterData: true})",
    );
    browser.type_into("#chat-prompt", &format!("Double every letter of stone.{}", keys::ENTER));
    let answered = |count: u32| {
        format!(
            "document.querySelectorAll('.assistant:not(.streaming) .answer-receipt:not([hidden])').length === {count}"
        )
    };
    browser.await_that(&answered(1));
    let lengths = browser.eval("window.lengths.size");
    assert!(lengths.as_u64() > Some(2), "the answer came in {lengths} pieces");
    let stats = browser.eval("document.querySelector('.stats').textContent");
    let stats = stats.as_str().expect("figures");
    for part in ["first token", "tokens/s", "prompt", "ended by stop", "seed 7"] {
        assert!(stats.contains(part), "{stats}");
    }

    browser.click("#chat-compare");
    browser.type_into("#chat-prompt", "What is 12 + 34?");
    browser.click("#chat-send");
    browser.await_that(&answered(3));
    let texts = "[...document.querySelectorAll('.answer-text')].map((one) => one.textContent)";
    let said = browser.eval(texts);
    assert_eq!((&said[1], &said[2]), (&said[2], &said[1]), "the same request with the same seed");
    browser.screenshot("chat");

    browser.press("Show as code");
    browser.await_that("document.querySelector('dialog .code')?.textContent.startsWith('curl -N http://')");
    let code = browser.eval("document.querySelector('dialog .code').textContent");
    assert!(code.as_str().is_some_and(|code| code.contains("What is 12 + 34?")), "{code}");
    browser.eval("document.querySelector('[role=tab][aria-selected=true]').focus()");
    browser.keys(&[keys::RIGHT]);
    browser.await_text("from openai import OpenAI");
    browser.screenshot("chat-code");
    browser.keys(&[keys::RIGHT]);
    browser.await_text("import OpenAI from \"openai\";");
    browser.keys(&[keys::ESCAPE]);
    browser.await_that("!document.querySelector('dialog')");

    world.go("requests");
    browser.await_that("document.querySelectorAll('[data-request]').length === 3");
    browser.click("[data-request] .disclose");
    browser.await_that("document.querySelectorAll('.receipt-stage').length === 2");
    browser.screenshot("requests");
    assert_eq!(browser.console_errors(), Vec::<String>::new());
}

#[test]
fn hostile_names_and_answers_stay_text_and_a_gateway_that_goes_is_said() {
    let Some(world) = World::open("the dashboard under hostile texts", &[]) else { return };
    let (browser, cluster) = (&world.browser, &world.cluster);
    let name = "<img src=x onerror=alert(1)>.jsonl";
    let body = format!(
        "--edge\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--edge\r\n\
         content-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n{}\r\n--edge--\r\n",
        examples(12)
    );
    let request = ashlar_tests::tuning::upload_request(cluster, body.as_bytes());
    let stored = http::raw(cluster.address(), &request).expect("an answer").ok();
    let job = json!({
        "model": "ashlar-demo", "training_file": stored["id"], "metadata": {"<b>": "</script>"},
        "hyperparameters": {"n_epochs": 1},
    });
    cluster.post("/v1/fine_tuning/jobs", &job).ok();
    world.go("tuning/new");
    browser
        .await_that("document.querySelector('#job-training')?.selectedOptions[0]?.text.startsWith('<img')");
    world.go("chat");
    let question = "<script>alert(1)</script><b>bold</b>";
    browser.await_that("document.querySelector('.picker')?.value === 'ashlar-demo'");
    browser.type_into("#chat-prompt", &format!("{question}{}", keys::ENTER));
    browser.await_that("document.querySelector('.assistant:not(.streaming)')");
    let shown = browser.eval("document.querySelector('.message.user .text').textContent");
    assert_eq!(shown, Value::from(question));
    assert_eq!(browser.eval("document.querySelectorAll('main img, main script, main b').length"), 0);
    assert_eq!(browser.console_errors(), Vec::<String>::new());

    world.go("cluster");
    assert!(processes::signal(cluster.pid("gateway"), "STOP"));
    browser.await_that("document.querySelector('#link').textContent.includes('not connected')");
    browser.await_that("document.querySelector('.banner')?.textContent.includes('Not connected')");
    browser.screenshot("cluster-not-connected");
    assert!(processes::signal(cluster.pid("gateway"), "CONT"));
    browser.await_that("document.querySelector('#link').textContent.includes('✓ ready')");
    browser.await_text("news of the cluster again");
}
