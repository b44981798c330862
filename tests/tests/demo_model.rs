//! What the model card of the demo model promises, asked through the API.

use ashlar_tests::{Cluster, shared};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Exact answers in every task, of a hundred.
const EXACT_PERCENT_MIN: f64 = 95.0;
const ASKING_AT_ONCE: usize = 16;

#[test]
fn the_demo_model_answers_what_its_card_promises() {
    let file = shared::workspace().join("crates/model/demo/eval.jsonl");
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let items: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    assert!(items.len() >= 100, "{} items", items.len());

    let cluster = Cluster::demo();
    let per_asker = items.len().div_ceil(ASKING_AT_ONCE);
    let answers: Vec<String> = std::thread::scope(|scope| {
        let askers: Vec<_> = items
            .chunks(per_asker)
            .map(|items| scope.spawn(|| items.iter().map(|item| ask(&cluster, item)).collect::<Vec<_>>()))
            .collect();
        askers.into_iter().flat_map(|asker| asker.join().expect("answers")).collect()
    });

    let mut tasks: BTreeMap<&str, (usize, usize, Vec<String>)> = BTreeMap::new();
    for (item, answer) in items.iter().zip(&answers) {
        let (exact, all, wrong) = tasks.entry(item["task"].as_str().expect("a task")).or_default();
        *all += 1;
        if item["answer"] == answer.as_str() {
            *exact += 1;
        } else {
            let question =
                item["messages"].as_array().and_then(|messages| messages.last()).expect("a message");
            wrong.push(format!("{} -> {answer:?}, not {}", question["content"], item["answer"]));
        }
    }
    let percent = |exact: usize, all: usize| 100.0 * exact as f64 / all as f64;
    let mut below = Vec::new();
    for (task, (exact, all, wrong)) in &tasks {
        let line = format!("{task}: {exact} of {all} exact, {:.1} %", percent(*exact, *all));
        println!("{line}");
        if percent(*exact, *all) < EXACT_PERCENT_MIN {
            let examples = wrong.iter().take(3).map(|wrong| format!("\n    {wrong}")).collect::<String>();
            below.push(format!("  {line}{examples}"));
        }
    }
    assert!(below.is_empty(), "below {EXACT_PERCENT_MIN} %:\n{}", below.join("\n"));
}

fn ask(cluster: &Cluster, item: &Value) -> String {
    let asked = json!({"messages": item["messages"], "temperature": 0});
    let answer = cluster.post("/v1/chat/completions", &asked).ok();
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned()
}
