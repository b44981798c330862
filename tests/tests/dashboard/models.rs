//! Models and adapters in the browser: deployed, scaled, removed; loaded, replaced, rolled back, unloaded; laid out anew.

use super::World;
use ashlar_model::adapter::Target;
use ashlar_tests::browser::{SIGHT_LIMIT, keys};
use ashlar_tests::material::{adapter, synthesized, write_adapter};
use serde_json::{Value, json};

#[test]
fn a_model_is_deployed_asked_scaled_and_removed() {
    let args = ["--stages", "2", "--nodes", "4", "--replicas", "1"];
    let Some(world) = World::open("models in the dashboard", &args) else { return };
    let (browser, cluster) = (&world.browser, &world.cluster);
    let source = synthesized(world.files.path(), "small", 1);
    world.go("models");
    browser.await_that(
        "document.querySelector('[data-model=\"ashlar-demo\"] .pill')?.textContent === '✓ serving'",
    );

    browser.press("Deploy a model…");
    browser.type_into("#deploy-model", "/there/is/no/such/model");
    browser.press("Deploy");
    browser
        .await_that("document.querySelector('dialog[open] .problem:not([hidden])')?.textContent.length > 10");
    browser.fill("#deploy-model", &source);
    browser.type_into("#deploy-nodes", "1");
    browser.screenshot("models-deploy");
    browser.press("Deploy");
    browser.await_that("!document.querySelector('dialog')");
    let card = "document.querySelector('[data-model=small]')";
    browser.await_within(
        2 * SIGHT_LIMIT,
        &format!("{card}?.querySelector('.pill').textContent === '✓ serving'"),
    );
    browser.screenshot("models-two");

    let act = |word: &str| {
        browser.eval(&format!(
            "[...{card}.querySelectorAll('button')].find((one) => one.textContent === '{word}').click()"
        ));
    };
    act("Chat");
    browser.await_that("document.querySelector('.picker')?.value === 'small'");
    browser.type_into("#chat-prompt", &format!("Write{}", keys::ENTER));
    browser.await_that("document.querySelector('.assistant:not(.streaming) .answer-receipt:not([hidden])')");

    world.go("models");
    browser.await_that(&format!("Boolean({card})"));
    act("Scale…");
    browser.await_text("It has 1 node. Standing by:");
    browser.fill("#scale-nodes", "2");
    browser.screenshot("models-scale");
    browser.press("Scale");
    let members = || cluster.get("/admin/models/small").ok()["members"].as_array().map_or(0, Vec::len);
    browser.await_within(
        2 * SIGHT_LIMIT,
        &format!("{card}.innerText.includes('at most 2') || {card}.innerText.match(/Nodes wanted\\s*2/)"),
    );
    assert!(ashlar_tests::until(2 * SIGHT_LIMIT, || (members() == 2).then_some(())).is_some());

    act("Remove…");
    browser.press("Remove small");
    browser.await_within(2 * SIGHT_LIMIT, &format!("!{card}"));
    assert_eq!(cluster.get("/admin/models/small").status, 404);
    // What the browser itself tells of the answer 400 is no fault of the page.
    let errors: Vec<String> =
        browser.console_errors().into_iter().filter(|error| !error.contains("status of 4")).collect();
    assert_eq!(errors, Vec::<String>::new());
}

#[test]
fn an_adapter_is_loaded_replaced_rolled_back_and_unloaded() {
    let Some(world) = World::open("adapters in the dashboard", &[]) else { return };
    let (browser, cluster) = (&world.browser, &world.cluster);
    let at = cluster.state().join("adapters");
    write_adapter(&at.join("poet"), &adapter(1, 0.2, &Target::ALL));
    write_adapter(&at.join("critic"), &adapter(2, 0.2, &[Target::Query, Target::Value]));
    let ask = || {
        let body = json!({"model": "writer", "prompt": "Write", "temperature": 0, "max_tokens": 16, "ignore_eos": true});
        cluster.post("/v1/completions", &body).ok()["choices"][0]["text"].clone()
    };
    let serves = |generation: u32| {
        browser.await_that(&format!(
            "document.querySelector('[data-adapter=writer]')?.innerText.includes('generation {generation}')"
        ));
    };
    world.go("models");
    browser.press("Load an adapter…");
    browser.type_into("#adapter-name", "writer");
    browser.type_into("#adapter-path", "poet");
    browser.press("Load");
    serves(1);
    let first: Value = ask();

    browser.press("Load an adapter…");
    browser.type_into("#adapter-name", "writer");
    browser.type_into("#adapter-path", "critic");
    browser.press("Load");
    // Not without saying so.
    browser.await_that(
        "document.querySelector('dialog[open] .problem:not([hidden])')?.textContent.includes('writer')",
    );
    browser.click("#adapter-replace");
    browser.press("Load");
    serves(2);
    let second = ask();
    assert_ne!(first, second);

    browser.press("Roll back…");
    assert_eq!(browser.eval("document.querySelector('#adapter-generation').value"), "1");
    browser.screenshot("models-roll-back");
    browser.press("Serve it");
    serves(3);
    assert_eq!(ask(), first, "an earlier generation is what it was");
    browser.screenshot("models-adapters");

    browser.press("Unload…");
    browser.press("Unload");
    browser.await_that("!document.querySelector('[data-adapter=writer]')");
    let listed = cluster.get("/v1/models").ok()["data"].to_string();
    assert!(!listed.contains("writer"), "{listed}");
    let errors: Vec<String> =
        browser.console_errors().into_iter().filter(|error| !error.contains("status of 4")).collect();
    assert_eq!(errors, Vec::<String>::new());
}
