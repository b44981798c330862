//! Fine-tuning in the browser: files, jobs, what they make.

use super::World;
use ashlar_tests::browser::{SIGHT_LIMIT, keys};
use ashlar_tests::tuning::{JOB_LIMIT, examples, preferences};
use ashlar_tests::until;
use serde_json::json;

/// The status that the page shows of the job it shows.
fn status(word: &str) -> String {
    format!("document.querySelector('.job .card-head .pill')?.textContent.includes('{word}')")
}

#[test]
fn a_file_is_checked_and_a_job_is_made_followed_paused_and_cancelled() {
    let Some(world) = World::open("fine-tuning in the dashboard", &[]) else { return };
    let browser = &world.browser;
    world.go("tuning/new");
    browser.await_that("document.querySelector('#job-model')?.value === 'ashlar-demo'");
    world.upload("broken.jsonl", &(examples(12) + "{\"messages\": []}\nno json\n"));
    browser.await_that("document.querySelector('.problem-lines')?.innerText.includes('line 13')");
    browser.await_text("2 lines of broken.jsonl cannot be used. It was not uploaded.");
    browser.screenshot("tuning-broken");

    // The cluster's own report, where somebody insists.
    browser.press("Upload it all the same");
    browser.await_text("broken.jsonl is uploaded");
    browser.press("Start the job");
    browser.await_that(&status("failed"));
    browser.await_that("document.querySelector('.job .problem-lines')?.innerText.includes('line 13')");

    browser.press("New job");
    world.upload("held-out.jsonl", &examples(8));
    browser.await_text("held-out.jsonl is uploaded");
    world.upload("train.jsonl", &examples(48));
    browser.await_text("train.jsonl is uploaded");
    browser.choose("#job-validation", "held-out.jsonl");
    for (field, value) in [
        ("epochs", "30"),
        ("batch", "8"),
        ("rate", "15"),
        ("rank", "4"),
        ("suffix", "doubler"),
        ("seed", "7"),
    ] {
        browser.type_into(&format!("#job-{field}"), value);
    }
    browser.screenshot("tuning-new");
    browser.press("Start the job");
    let curve = "document.querySelector('.chart .line.c1[d*=L]')";
    browser.await_within(JOB_LIMIT, curve);
    browser.press("Pause");
    browser.await_that(&status("paused"));
    browser.press("Resume");
    browser.await_within(JOB_LIMIT, &status("succeeded"));
    browser.await_that("document.querySelector('.chart .dot.c2')");
    browser.await_text("The job has successfully completed");
    browser.await_text("Download results.csv");
    browser.await_text("Download adapter_model.safetensors");
    browser.screenshot("tuning");

    browser.press("New job");
    browser.choose("#job-training", "train.jsonl");
    browser.type_into("#job-suffix", "never");
    browser.eval("document.querySelector('#job-epochs').value = 200");
    browser.press("Start the job");
    browser.await_within(JOB_LIMIT, &status("running"));
    browser.press("Cancel…");
    browser.press("Cancel the job");
    browser.await_that(&status("cancelled"));

    world.go("models");
    browser.await_that("document.querySelector('[data-adapter*=doubler]')");
    browser.screenshot("models");
    browser.press("Compare");
    browser.await_that("[...document.querySelectorAll('.picker')].map((one) => one.value.includes('doubler')).join() === 'false,true'");
    browser.type_into("#chat-prompt", &format!("Double every letter of stone.{}", keys::ENTER));
    browser.await_that("document.querySelectorAll('.assistant:not(.streaming)').length === 2");
    browser.screenshot("chat-compare");
    world.go("models");
    let served = || world.cluster.get("/v1/models").ok()["data"].as_array().map_or(0, Vec::len);
    let before = served();
    browser.await_that(&format!("document.querySelectorAll('[data-adapter]').length === {}", before - 1));
    browser.press("Unload…");
    browser.press("Unload");
    browser.await_that(&format!("document.querySelectorAll('[data-adapter]').length === {}", before - 2));
    assert_eq!(served(), before - 1);
    assert_eq!(browser.console_errors(), Vec::<String>::new());
}

#[test]
fn preferences_are_learnt_compared_before_they_are_served_and_their_adapter_is_downloaded() {
    let Some(world) = World::open("preferences in the dashboard", &[]) else { return };
    let (browser, cluster) = (&world.browser, &world.cluster);
    world.go("tuning/new");
    browser.await_that("document.querySelector('#job-model')?.value === 'ashlar-demo'");
    world.upload("held-out.jsonl", &examples(10));
    browser.await_text("held-out.jsonl is uploaded");
    world.upload("train.jsonl", &preferences(24));
    browser.await_text("train.jsonl is uploaded");
    // What is in the file says how it can be learnt.
    browser.await_that("document.querySelector('#job-method').value === 'dpo'");
    browser.choose("#job-publish", "only if its loss is lower");
    browser.choose("#job-evaluation", "held-out.jsonl");
    for (field, value) in [
        ("epochs", "2"),
        ("batch", "8"),
        ("beta", "0.2"),
        ("rank", "4"),
        ("suffix", "chooser"),
        ("seed", "7"),
    ] {
        browser.fill(&format!("#job-{field}"), value);
    }
    browser.screenshot("tuning-dpo-new");
    browser.press("Start the job");
    browser.await_within(JOB_LIMIT, &status("succeeded"));
    browser.await_text("DPO, beta 0.2");
    browser.await_text("Promotion");
    browser.screenshot("tuning-dpo");
    let job = cluster.get("/v1/fine_tuning/jobs?limit=1").ok()["data"][0].clone();
    let reason = job["ashlar"]["promotion"]["reason"].as_str().expect("why it is served, or not");
    browser.await_text(reason);
    assert_eq!(
        (&job["method"]["type"], &job["ashlar"]["promotion"]["metric"]),
        (&json!("dpo"), &json!("loss"))
    );

    let downloads = world.files.path().join("downloads");
    std::fs::create_dir(&downloads).expect("a directory");
    browser.download_to(&downloads);
    let path = format!("/v1/fine_tuning/jobs/{}/adapter/", job["id"].as_str().expect("an id"));
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        browser.press(&format!("Download {file}"));
        let expected = cluster.get(&format!("{path}{file}"));
        assert_eq!(expected.status, 200);
        // A browser may put something before the name, or a number behind it.
        let (stem, end) = file.rsplit_once('.').expect("a name with an end");
        let saved = until(SIGHT_LIMIT, || {
            let mut files = std::fs::read_dir(&downloads).ok()?.filter_map(Result::ok);
            let of_this = |name: &str| name.contains(stem) && name.ends_with(end);
            let found = files.find(|one| of_this(&one.file_name().to_string_lossy()))?;
            std::fs::read(found.path()).ok().filter(|bytes| *bytes == expected.body)
        });
        assert!(saved.is_some(), "{file} did not arrive as it is");
    }
    assert_eq!(browser.console_errors(), Vec::<String>::new());
}
