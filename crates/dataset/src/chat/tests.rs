//! Which text of which template is learnt. Templates of a few lines are here; real ones lie outside the repository, and where they
//! are absent the tests say so and pass.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::example::Example;
use std::path::{Path, PathBuf};

/// A template with what renders it.
struct Model {
    template: ChatTemplate,
    reasoning: Option<ReasoningMarkers>,
    ends: Vec<String>,
}

impl Model {
    fn new(source: &str, bos: &str, eos: &str, ends: &[&str]) -> Model {
        let mut special = Map::new();
        special.insert("bos_token".into(), bos.into());
        special.insert("eos_token".into(), eos.into());
        Model {
            template: ChatTemplate::new(source, None, special).unwrap(),
            reasoning: ReasoningMarkers::detect(source),
            ends: ends.iter().map(|&end| end.to_owned()).collect(),
        }
    }

    fn render(&self, line: &Value) -> Result<RenderedChat, LineProblem> {
        let Example::Chat(chat) = Example::parse(line.to_string().as_bytes())? else { panic!("no chat") };
        self.renderer(&Map::new()).chat(chat)
    }

    fn renderer<'a>(&'a self, kwargs: &'a Map<String, Value>) -> ChatRenderer<'a> {
        ChatRenderer {
            template: &self.template,
            reasoning: self.reasoning.as_ref(),
            ends: &self.ends,
            kwargs,
            now: TemplateTime::default(),
        }
    }

    /// Every text, with what is learnt in brackets.
    fn shown(&self, line: &Value) -> Vec<String> {
        self.render(line).unwrap().texts.iter().map(show).collect()
    }
}

fn show(marked: &MarkedText) -> String {
    let (mut shown, mut at) = (String::new(), 0);
    for target in &marked.targets {
        shown += &format!("{}⟦{}⟧", &marked.text[at..target.start], &marked.text[target.clone()]);
        at = target.end;
    }
    shown + &marked.text[at..]
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn two_turns() -> Value {
    json!({"messages": [
        message("system", "S"),
        message("user", "Q1"),
        message("assistant", "A1"),
        message("user", "Q2"),
        message("assistant", "A2"),
    ]})
}

/// A question, a call, its answer, an answer.
fn tool_turns() -> Value {
    let call =
        json!({"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}});
    json!({"messages": [
        message("user", "Q"),
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "name": "f", "content": "R"},
        message("assistant", "A"),
    ]})
}

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn chatml() -> Model {
    Model::new(CHATML, "", "<|im_end|>", &["<|im_end|>"])
}

#[test]
fn answers_are_learnt_up_to_the_token_that_ends_them_and_share_a_text() {
    assert_eq!(
        chatml().shown(&two_turns()),
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n\
          <|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧"
        ]
    );
}

#[test]
fn an_answer_of_weight_0_is_only_read_and_what_follows_the_last_one_is_left_out() {
    let mut line = two_turns();
    line["messages"][4]["weight"] = 0.into();
    line["messages"][2]["weight"] = 1.into();
    assert_eq!(
        chatml().shown(&line),
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧"
        ]
    );
    let mut line = two_turns();
    line["messages"][2]["weight"] = 0.into();
    assert_eq!(
        chatml().shown(&line),
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n\
          <|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧"
        ]
    );
}

#[test]
fn answers_that_repeat_each_other_are_each_learnt_once() {
    let line = json!({"messages": [
        message("user", "Q"),
        message("assistant", "A"),
        message("assistant", "A"),
        message("user", "Q"),
        message("assistant", "A"),
    ]});
    let rendered = chatml().render(&line).unwrap();
    assert_eq!((rendered.texts.len(), rendered.texts[0].targets.len()), (1, 3));
}

#[test]
fn a_template_that_forgets_reasoning_makes_one_text_of_each_answer() {
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let model = Model::new(source, "", "</s>", &["</s>"]);
    let line = json!({"messages": [
        message("user", "Q1"),
        message("assistant", "<think>T1</think>A1"),
        message("user", "Q2"),
        message("assistant", "A2"),
        message("user", "Q3"),
        message("assistant", "A3"),
    ]});
    // The second answer has nothing to forget, so it shares a text with the third.
    assert_eq!(
        model.shown(&line),
        [
            "[user]Q1</s>[assistant]⟦<think>T1</think>A1</s>⟧",
            "[user]Q1</s>[assistant]A1</s>[user]Q2</s>[assistant]⟦A2</s>⟧[user]Q3</s>[assistant]⟦A3</s>⟧",
        ]
    );
}

#[test]
fn a_prompt_that_the_history_does_not_repeat_is_joined_to_its_answer() {
    // The prompt closes the reasoning; the history never shows any.
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]<think></think>{% endif %}";
    let model = Model::new(source, "", "</s>", &["</s>"]);
    assert_eq!(
        model.shown(&two_turns()),
        [
            "[system]S</s>[user]Q1</s>[assistant]<think></think>⟦A1</s>⟧",
            "[system]S</s>[user]Q1</s>[assistant]A1</s>[user]Q2</s>[assistant]<think></think>⟦A2</s>⟧",
        ]
    );
    // Where an answer begins like what the prompt adds, nothing of it is taken for a header.
    let line = json!({"messages": [message("user", "Q"), message("assistant", "<thing>")]});
    assert_eq!(model.shown(&line), ["[user]Q</s>[assistant]<think></think>⟦<thing></s>⟧"]);
    // Mistral 7B v0.3: the system prompt stands before the last message if that is a question. The space is the model's.
    let source = "{% set s = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}[INST] {% if loop.last %}{{ s }} {% endif %}{{ m.content }}[/INST]{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}";
    let model = Model::new(source, "", "</s>", &["</s>"]);
    assert_eq!(
        model.shown(&two_turns()),
        ["[INST] S Q1[/INST]⟦ A1</s>⟧", "[INST] Q1[/INST] A1</s>[INST] S Q2[/INST]⟦ A2</s>⟧"]
    );
}

#[test]
fn reasoning_that_only_the_prompt_opens_cannot_be_learnt() {
    let source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% if off %}</think>{% endif %}{% endif %}";
    let model = Model::new(source, "", "</s>", &["</s>"]);
    let problem = model.render(&two_turns()).unwrap_err();
    assert!(matches!(problem, LineProblem::ReasoningLeftOut { turn: Turn::Message(4) }), "{problem}");
    let mut kwargs = Map::new();
    kwargs.insert("off".into(), true.into());
    let Example::Chat(chat) = Example::parse(two_turns().to_string().as_bytes()).unwrap() else { panic!() };
    assert_eq!(model.renderer(&kwargs).chat(chat).unwrap().texts.len(), 2);
}

#[test]
fn an_answer_that_no_token_ends_is_learnt_whole_and_counted() {
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let model = Model::new(source, "", "</s>", &["</s>"]);
    let rendered = model.render(&two_turns()).unwrap();
    assert_eq!(rendered.unterminated, 2);
    assert_eq!(
        rendered.texts.iter().map(show).collect::<Vec<_>>(),
        ["system: S\nuser: Q1\nassistant: ⟦A1\n⟧user: Q2\nassistant: ⟦A2\n⟧"]
    );
}

#[test]
fn of_several_ends_the_first_one_counts() {
    // Phi 3.5 closes a rendering with a token of its own.
    let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}";
    let line = json!({"messages": [
        message("user", "Q1"), message("assistant", "A1"), message("user", "Q2"), message("assistant", "A2"),
    ]});
    let both = Model::new(source, "", "<|eot|>", &["<|eot|>", "<|end|>"]);
    assert_eq!(
        both.shown(&line),
        ["<|user|>Q1<|end|>\n<|assistant|>⟦A1<|end|>⟧\n<|user|>Q2<|end|>\n<|assistant|>⟦A2<|end|>⟧"]
    );
    // Where serving stops only at the other one, the model has to write both, and no text shows that of both answers.
    let one = Model::new(source, "", "<|eot|>", &["<|eot|>"]);
    assert_eq!(
        one.shown(&line),
        [
            "<|user|>Q1<|end|>\n<|assistant|>⟦A1<|end|>\n<|eot|>⟧",
            "<|user|>Q1<|end|>\n<|assistant|>A1<|end|>\n<|user|>Q2<|end|>\n<|assistant|>⟦A2<|end|>\n<|eot|>⟧",
        ]
    );
}

#[test]
fn a_template_that_refuses_or_hides_an_answer_is_an_error_that_names_it() {
    let refuses = Model::new("{{ raise_exception('no') }}", "", "</s>", &[]);
    let problem = refuses.render(&two_turns()).unwrap_err().to_string();
    assert!(problem.starts_with("up to messages[4]: ") && problem.contains("no"), "{problem}");
    let hides = Model::new("{% for m in messages %}{{ m.role }}{% endfor %}", "", "</s>", &[]);
    // The role alone is shown: that is what follows the prompt, and it is no answer that anybody wants, but it is text.
    assert!(hides.render(&two_turns()).is_ok());
    let constant = Model::new("hello", "", "</s>", &[]);
    let problem = constant.render(&two_turns()).unwrap_err();
    assert!(matches!(problem, LineProblem::AnswerNotFound { turn: Turn::Message(4) }), "{problem}");
}

#[test]
fn a_conversation_of_very_many_long_turns_is_refused_before_it_takes_the_memory() {
    let turn = "x".repeat(20_000);
    let messages: Vec<Value> =
        (0..400).map(|index| message(if index % 2 == 0 { "user" } else { "assistant" }, &turn)).collect();
    let problem = chatml().render(&json!({"messages": messages})).unwrap_err();
    assert!(matches!(problem, LineProblem::TooManyTurns { .. }), "{problem}");
}

#[test]
fn the_two_answers_of_a_preference_follow_the_same_prompt() {
    let line = json!({
        "input": {"messages": [message("user", "Q")]},
        "preferred_output": [message("assistant", "good")],
        "non_preferred_output": [message("assistant", "bad")],
    });
    let Example::Preference { mut input, preferred, non_preferred } =
        Example::parse(line.to_string().as_bytes()).unwrap()
    else {
        panic!()
    };
    let (model, kwargs) = (chatml(), Map::new());
    let renderer = model.renderer(&kwargs);
    let shown = [(preferred, Turn::Preferred), (non_preferred, Turn::NonPreferred)]
        .map(|(answer, turn)| show(&renderer.preference(&mut input, answer, turn).unwrap().0));
    let prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(shown, [format!("{prompt}⟦good<|im_end|>⟧"), format!("{prompt}⟦bad<|im_end|>⟧")]);
}

// Real templates.

/// The directory of real templates; says so where it is absent.
fn templates() -> Option<PathBuf> {
    let root = std::env::var_os("ASHLAR_SHARED_DATA").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data")),
        PathBuf::from,
    );
    let full = root.join("chat-templates");
    if full.exists() {
        return Some(full);
    }
    eprintln!("SKIPPED: {} is absent; set ASHLAR_SHARED_DATA to run this test", full.display());
    None
}

fn real(dir: &Path, name: &str, ends: &[&str]) -> Model {
    let source = std::fs::read_to_string(dir.join(format!("{name}.jinja"))).unwrap();
    Model::new(&source, "<s>", "</s>", ends)
}

/// The ends of every text, from the last `chars` on; long system prompts come before.
fn tails(shown: Vec<String>, chars: usize) -> Vec<String> {
    let tail = |text: String| {
        let start = text.char_indices().rev().nth(chars - 1).map_or(0, |(at, _)| at);
        text[start..].to_owned()
    };
    shown.into_iter().map(tail).collect()
}

#[test]
fn qwen_2_5_shares_a_text() {
    let Some(dir) = templates() else { return };
    let model = real(&dir, "Qwen-Qwen2.5-7B-Instruct", &["<|im_end|>", "<|endoftext|>"]);
    assert_eq!(
        model.shown(&two_turns()),
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n\
          <|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧"
        ]
    );
    assert_eq!(
        tails(model.shown(&tool_turns()), 222),
        [
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n\
          </tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\nR\n</tool_response><|im_end|>\n<|im_start|>assistant\n\
          ⟦A<|im_end|>⟧"
        ]
    );
}

#[test]
fn qwen_3_learns_each_answer_with_its_reasoning_in_a_text_of_its_own() {
    let Some(dir) = templates() else { return };
    let model = real(&dir, "Qwen-Qwen3-0.6B", &["<|im_end|>", "<|endoftext|>"]);
    let mut line = two_turns();
    line["messages"][4]["content"] = "<think>\nT\n</think>\n\nA2".into();
    assert_eq!(
        model.shown(&line),
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n\
             ⟦<think>\n\n</think>\n\nA1<|im_end|>⟧",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n\
             <|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦<think>\nT\n</think>\n\nA2<|im_end|>⟧",
        ]
    );
    assert_eq!(
        model.shown(&tool_turns()),
        [
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n<tool_call>\n\
             {\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call><|im_end|>⟧",
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n\
             </tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nR\n</tool_response><|im_end|>\n\
             <|im_start|>assistant\n⟦<think>\n\n</think>\n\nA<|im_end|>⟧",
        ]
    );
    // With thinking switched off, the prompt has the empty reasoning, and only the rest is learnt.
    let mut kwargs = Map::new();
    kwargs.insert("enable_thinking".into(), false.into());
    let Example::Chat(chat) = Example::parse(two_turns().to_string().as_bytes()).unwrap() else { panic!() };
    let texts = model.renderer(&kwargs).chat(chat).unwrap().texts;
    assert!(show(&texts[1]).ends_with("<think>\n\n</think>\n\n⟦A2<|im_end|>⟧"));
}

#[test]
fn mistral_v3_shares_a_text_unless_there_is_a_system_prompt() {
    let Some(dir) = templates() else { return };
    let model = real(&dir, "mistral-common-v3_spm", &["</s>"]);
    assert_eq!(
        model.shown(&two_turns()),
        ["<s>[INST] S\n\nQ1[/INST]⟦ A1</s>⟧", "<s>[INST] Q1[/INST] A1</s>[INST] S\n\nQ2[/INST]⟦ A2</s>⟧"]
    );
    let mut line = two_turns();
    line["messages"].as_array_mut().unwrap().remove(0);
    assert_eq!(model.shown(&line), ["<s>[INST] Q1[/INST]⟦ A1</s>⟧[INST] Q2[/INST]⟦ A2</s>⟧"]);
    assert_eq!(
        model.shown(&tool_turns()),
        [
            "<s>[INST] Q[/INST]⟦[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}, \"id\": \"call00001\"}]</s>⟧\
          [TOOL_RESULTS] {\"content\": \"R\", \"call_id\": \"call00001\"}[/TOOL_RESULTS]⟦ A</s>⟧"
        ]
    );
}

#[test]
fn other_families_learn_what_serving_lets_them_write() {
    let Some(dir) = templates() else { return };
    let shown = |name: &str, ends: &[&str]| tails(real(&dir, name, ends).shown(&two_turns()), 75);
    assert_eq!(
        shown("openai-gpt-oss-120b", &["<|return|>", "<|call|>"]),
        [
            "user<|message|>Q1<|end|><|start|>assistant⟦<|channel|>final<|message|>A1<|return|>⟧",
            "user<|message|>Q2<|end|><|start|>assistant⟦<|channel|>final<|message|>A2<|return|>⟧",
        ]
        .map(|text| text[text.len() - 79..].to_owned())
    );
    assert_eq!(
        shown("mistralai-Mistral-Nemo-Instruct-2407", &["</s>"]),
        ["<s>[INST]S\n\nQ1[/INST]⟦A1</s>⟧", "<s>[INST]Q1[/INST]A1</s>[INST]S\n\nQ2[/INST]⟦A2</s>⟧"]
    );
    assert_eq!(
        shown("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", &["<｜end▁of▁sentence｜>"])[0],
        "<s>S<｜User｜>Q1<｜Assistant｜><think>\n</think>⟦A1<｜end▁of▁sentence｜>⟧"
    );
    for name in ["HuggingFaceTB-SmolLM3-3B", "Qwen3-Coder"] {
        let texts = real(&dir, name, &["<|im_end|>"]).render(&two_turns()).unwrap().texts;
        let learnt = |marked: &MarkedText| -> Vec<String> {
            marked.targets.iter().map(|target| marked.text[target.clone()].to_owned()).collect()
        };
        assert_eq!(
            texts.iter().map(learnt).collect::<Vec<_>>(),
            [["A1<|im_end|>", "A2<|im_end|>"]],
            "{name}"
        );
    }
}

/// The definition itself, over every real template and conversation: what stands before an answer is the prompt that is served there,
/// and each answer is learnt once.
#[test]
fn what_stands_before_an_answer_is_what_is_served_there() {
    let Some(dir) = templates() else { return };
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("golden_renders.json")).unwrap()).unwrap();
    let ends = ["<|im_end|>", "</s>", "<|end|>", "<|return|>", "<|call|>", "<｜end▁of▁sentence｜>"];
    let mut checked = 0;
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        if name == "stories260K" {
            continue;
        }
        let mut line = json!({"messages": case["messages"], "tools": case.get("tools")});
        let model = real(&dir, name, &ends);
        // A conversation that ends with a question gets an answer.
        let messages = line["messages"].as_array_mut().unwrap();
        if messages.last().unwrap()["role"] != "assistant" {
            messages.push(message("assistant", "An answer."));
        }
        let messages = messages.clone();
        let (Ok(Example::Chat(chat)), Ok(rendered)) =
            (Example::parse(line.to_string().as_bytes()), model.render(&line))
        else {
            continue;
        };
        let mut prompts: Vec<String> = chat
            .trained
            .iter()
            .map(|&index| {
                let before = Value::Array(messages[..index].to_vec());
                let kwargs = Map::new();
                model.renderer(&kwargs).render(&before, chat.tools.as_ref(), true).unwrap()
            })
            .collect();
        for marked in &rendered.texts {
            for target in &marked.targets {
                let before = &marked.text[..target.start];
                let at = prompts.iter().position(|prompt| prompt == before);
                prompts.remove(at.unwrap_or_else(|| panic!("{name}: nobody is served {before:?}")));
                checked += 1;
            }
        }
        assert_eq!(prompts, [""; 0], "{name}: not learnt");
    }
    assert!(checked > 80, "only {checked} answers were checked");
}
