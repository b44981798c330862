//! Keys in the browser: asked for, made, shown once, revoked.

use super::World;
use ashlar_tests::browser::SIGHT_LIMIT;
use ashlar_tests::{http, until};

#[test]
fn a_key_is_asked_for_made_shown_once_and_revoked() {
    let Some(world) = World::closed("keys in the dashboard", &["--keys"]) else { return };
    let (browser, cluster) = (&world.browser, &world.cluster);
    let first = cluster.state().join("admin.key");
    let first = until(SIGHT_LIMIT, || std::fs::read_to_string(&first).ok()).expect("the first key");
    world.go("keys");
    browser.await_text("An API key is needed");
    browser.screenshot("keys-asked");
    browser.type_into("dialog[open] input", "sk-this-is-none");
    browser.press("Use it");
    // It is asked for again, until it is right.
    browser.await_that("document.querySelector('dialog[open] input')?.value === ''");
    browser.type_into("dialog[open] input", first.trim());
    browser.press("Use it");
    browser.await_that("document.querySelector('[data-key]')");

    browser.press("Make a key…");
    browser.type_into("#key-name", "notebooks");
    browser.type_into("#key-tenant", "research");
    browser.click("#key-scope-training");
    browser.type_into("#key-requests-per-minute", "60");
    browser.type_into("#key-days", "30");
    browser.screenshot("keys-new");
    browser.press("Make it");
    browser.await_text("It is shown only now");
    let secret = browser.eval("document.querySelector('#key-secret').textContent");
    let secret = secret.as_str().expect("a key").to_owned();
    let status = || {
        let request = format!(
            "GET /v1/models HTTP/1.1\r\nhost: here\r\nauthorization: Bearer {secret}\r\nconnection: close\r\n\r\n"
        );
        http::raw(cluster.address(), request.as_bytes()).expect("an answer").status
    };
    assert_eq!(status(), 200);
    browser.screenshot("keys-shown-once");
    browser.press("Close");
    browser.await_that("!document.querySelector('dialog')");
    browser.await_text("notebooks");
    browser.await_text("tenant research");
    browser.await_text("inference, training");
    browser.await_text("60 requests/min");
    assert_eq!(browser.eval(&format!("document.documentElement.innerHTML.includes('{secret}')")), false);
    browser.screenshot("keys");

    browser.eval("[...document.querySelectorAll('[data-key]')].find((one) => one.innerText.includes('notebooks')).querySelector('button').click()");
    browser.press("Revoke it");
    browser.await_that(
        "![...document.querySelectorAll('[data-key]')].some((one) => one.innerText.includes('notebooks'))",
    );
    assert_eq!(status(), 401);
}
