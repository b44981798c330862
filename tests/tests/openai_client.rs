//! An unmodified OpenAI client (`async-openai`) against the whole service.

use ashlar_tests::Cluster;
use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::{ApiErrorResponse, OpenAIError};
use async_openai::types::chat::{
    ChatChoiceStream, ChatCompletionMessageToolCalls, CreateChatCompletionRequest,
    CreateChatCompletionResponse, FinishReason, Role,
};
use async_openai::types::completions::CreateCompletionRequest;
use futures::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;

const MODEL: &str = "ashlar-demo";

struct Service {
    client: Client<OpenAIConfig>,
    _cluster: Cluster,
}

impl Service {
    fn start() -> Service {
        let cluster = Cluster::demo();
        let config = OpenAIConfig::new()
            .with_api_base(format!("http://{}/v1", cluster.address()))
            .with_api_key("none is needed");
        Service { client: Client::with_config(config), _cluster: cluster }
    }

    async fn chat(&self, with: Value) -> Result<CreateChatCompletionResponse, OpenAIError> {
        self.client.chat().create(chat_request(with)).await
    }

    /// The chunks of a stream, which must end in order.
    async fn chat_stream(&self, with: Value) -> Vec<ChatChoiceStream> {
        let mut stream = self.client.chat().create_stream(chat_request(with)).await.expect("a stream");
        let mut choices = Vec::new();
        while let Some(chunk) = stream.next().await {
            choices.extend(chunk.expect("a chunk").choices);
        }
        choices
    }
}

fn chat_request(with: Value) -> CreateChatCompletionRequest {
    let mut body = json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is 12 + 34?"}],
        "temperature": 0,
    });
    merge(&mut body, with);
    serde_json::from_value(body).expect("a chat request")
}

fn completion_request(with: Value) -> CreateCompletionRequest {
    let mut body =
        json!({"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 16});
    merge(&mut body, with);
    serde_json::from_value(body).expect("a completion request")
}

fn merge(body: &mut Value, with: Value) {
    let (Value::Object(body), Value::Object(with)) = (body, with) else { panic!("objects") };
    body.extend(with);
}

fn contents(answer: &CreateChatCompletionResponse) -> Vec<String> {
    answer.choices.iter().map(|choice| choice.message.content.clone().unwrap_or_default()).collect()
}

#[track_caller]
fn api_error<T: std::fmt::Debug>(result: Result<T, OpenAIError>) -> ApiErrorResponse {
    match result {
        Err(OpenAIError::ApiError(error)) => error,
        other => panic!("not an error of the API: {other:?}"),
    }
}

fn weather_tools() -> Value {
    json!([
        {"type": "function", "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
                "required": ["city", "days"],
                "additionalProperties": false,
            },
        }},
        {"type": "function", "function": {
            "name": "stop",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": false},
        }},
    ])
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Weather {
    city: String,
    days: u8,
}

#[track_caller]
fn check_weather(arguments: &str) {
    let weather: Weather =
        serde_json::from_str(arguments).unwrap_or_else(|error| panic!("{error}: {arguments}"));
    assert!(
        ["Rome", "Oslo"].contains(&weather.city.as_str()) && (1..=3).contains(&weather.days),
        "{weather:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_answered_with_usage() {
    let service = Service::start();
    let answer = service.chat(json!({})).await.expect("an answer");
    assert_eq!((answer.object.as_str(), answer.model.as_str()), ("chat.completion", MODEL));
    assert!(answer.id.starts_with("chatcmpl-"));
    let choice = &answer.choices[0];
    assert_eq!(choice.message.role, Role::Assistant);
    assert_eq!(choice.finish_reason, Some(FinishReason::Stop));
    assert!(!contents(&answer)[0].is_empty());
    let usage = answer.usage.clone().expect("usage");
    assert!(usage.prompt_tokens > 12 && usage.completion_tokens > 0);
    assert_eq!(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
    assert_eq!(usage.prompt_tokens_details.and_then(|details| details.cached_tokens), Some(0));

    let again = service.chat(json!({})).await.expect("an answer");
    assert_eq!(contents(&again), contents(&answer));
    let cached =
        again.usage.and_then(|usage| usage.prompt_tokens_details).and_then(|details| details.cached_tokens);
    assert!(cached > Some(0), "the second time the prompt's full blocks are cached, not {cached:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_what_the_whole_answer_says() {
    let service = Service::start();
    for with in [json!({}), json!({"temperature": 1, "seed": 5, "n": 2, "max_tokens": 40})] {
        let whole = service.chat(with.clone()).await.expect("an answer");
        let chunks = service.chat_stream(with).await;
        for choice in &whole.choices {
            let own: Vec<&ChatChoiceStream> =
                chunks.iter().filter(|chunk| chunk.index == choice.index).collect();
            let text: String = own.iter().filter_map(|chunk| chunk.delta.content.as_deref()).collect();
            assert_eq!(Some(text), choice.message.content);
            assert_eq!(own.first().and_then(|chunk| chunk.delta.role), Some(Role::Assistant));
            assert_eq!(own.last().and_then(|chunk| chunk.finish_reason), choice.finish_reason);
            assert_eq!(own.iter().filter(|chunk| chunk.finish_reason.is_some()).count(), 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_usage_where_asked_for() {
    let service = Service::start();
    let whole = service.chat(json!({})).await.expect("an answer").usage.expect("usage");
    let asked = chat_request(json!({"stream_options": {"include_usage": true}}));
    let mut stream = service.client.chat().create_stream(asked).await.expect("a stream");
    let mut usages = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.expect("a chunk");
        assert_eq!(chunk.usage.is_some(), chunk.choices.is_empty());
        usages.extend(chunk.usage);
    }
    assert_eq!(usages.len(), 1);
    assert_eq!(usages[0].total_tokens, whole.total_tokens);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_tool_is_called_with_arguments_of_its_schema() {
    let service = Service::start();
    let choices = [json!("required"), json!({"type": "function", "function": {"name": "weather"}})];
    for (number, tool_choice) in choices.into_iter().enumerate() {
        for seed in 0..3 {
            let with = json!({
                "tools": weather_tools(), "tool_choice": tool_choice, "parallel_tool_calls": false,
                "temperature": 1, "seed": seed, "max_tokens": 200,
            });
            let answer = service.chat(with).await.expect("an answer");
            let choice = &answer.choices[0];
            assert_eq!(choice.finish_reason, Some(FinishReason::ToolCalls), "{choice:?}");
            let calls = choice.message.tool_calls.as_deref().unwrap_or_default();
            let [ChatCompletionMessageToolCalls::Function(call)] = calls else { panic!("{choice:?}") };
            assert!(call.id.starts_with("call_"));
            match call.function.name.as_str() {
                "weather" => check_weather(&call.function.arguments),
                "stop" if number == 0 => assert_eq!(call.function.arguments.replace(' ', ""), "{}"),
                other => panic!("called {other}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_call_can_be_put_together_from_a_stream() {
    let service = Service::start();
    let chunks = service
        .chat_stream(json!({
            "tools": weather_tools(), "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "parallel_tool_calls": false, "temperature": 1, "seed": 4, "max_tokens": 200,
        }))
        .await;
    let calls: Vec<_> = chunks.iter().filter_map(|chunk| chunk.delta.tool_calls.as_ref()).flatten().collect();
    assert!(calls.iter().all(|call| call.index == 0), "{calls:?}");
    let first = calls.first().expect("a call");
    assert!(first.id.as_deref().is_some_and(|id| id.starts_with("call_")));
    assert!(calls[1..].iter().all(|call| call.id.is_none()), "only the first chunk of a call has its id");
    let function =
        |call: &async_openai::types::chat::ChatCompletionMessageToolCallChunk| call.function.clone();
    assert_eq!(function(first).and_then(|function| function.name).as_deref(), Some("weather"));
    let arguments: String =
        calls.iter().filter_map(|call| function(call)).filter_map(|function| function.arguments).collect();
    check_weather(&arguments);
    assert_eq!(chunks.last().and_then(|chunk| chunk.finish_reason), Some(FinishReason::ToolCalls));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tools_on_auto_or_none_the_model_may_just_answer() {
    let service = Service::start();
    let plain = service.chat(json!({})).await.expect("an answer");
    for tool_choice in ["auto", "none"] {
        let with = json!({"tools": weather_tools(), "tool_choice": tool_choice});
        let answer = service.chat(with).await.expect("an answer");
        assert_eq!(contents(&answer), contents(&plain), "{tool_choice}");
        assert_eq!(answer.choices[0].finish_reason, Some(FinishReason::Stop));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_follows_its_json_schema() {
    #[derive(Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "that it can be read is what is tested")]
    struct Card {
        colour: Colour,
        sure: bool,
        numbers: [u8; 2],
    }
    #[derive(Deserialize, Debug)]
    #[serde(rename_all = "lowercase")]
    enum Colour {
        Red,
        Green,
    }
    let service = Service::start();
    let schema = json!({
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green"]},
            "sure": {"type": "boolean"},
            "numbers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99},
                        "minItems": 2, "maxItems": 2},
        },
        "required": ["colour", "sure", "numbers"],
        "additionalProperties": false,
    });
    for seed in 0..5 {
        let answer = service
            .chat(json!({
                // JSON may have any number of spaces, which this model would rather write than anything else.
                "temperature": 1, "seed": seed, "max_tokens": 300, "logit_bias": {"9": -20, "10": -20, "32": -20},
                "response_format": {"type": "json_schema", "json_schema": {"name": "card", "schema": schema, "strict": true}},
            }))
            .await
            .expect("an answer");
        let text = &contents(&answer)[0];
        serde_json::from_str::<Card>(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert_eq!(answer.choices[0].finish_reason, Some(FinishReason::Stop), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_describe_the_tokens_of_the_answer() {
    let service = Service::start();
    let answer = service.chat(json!({"logprobs": true, "top_logprobs": 4})).await.expect("an answer");
    let tokens =
        answer.choices[0].logprobs.as_ref().and_then(|logprobs| logprobs.content.as_ref()).expect("logprobs");
    let text: Vec<u8> = tokens.iter().flat_map(|token| token.bytes.clone().expect("bytes")).collect();
    assert_eq!(String::from_utf8_lossy(&text), contents(&answer)[0]);
    for token in tokens {
        assert_eq!(token.top_logprobs.len(), 4);
        assert_eq!(token.top_logprobs[0].token, token.token, "greedy takes the likeliest");
        assert!(token.top_logprobs.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
        let sum: f32 = token.top_logprobs.iter().map(|top| top.logprob.exp()).sum();
        assert!(token.logprob <= 0.0 && sum <= 1.0 + 1e-5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_differ_from_each_other_and_a_seed_repeats_them() {
    let service = Service::start();
    // Numbers that it has never seen make it guess.
    let guess = json!([{"role": "user", "content": "What is 12345 + 999?"}]);
    let with = |seed: i64, n: u8| json!({"messages": guess, "n": n, "temperature": 2, "seed": seed, "max_tokens": 24});
    let first = service.chat(with(11, 8)).await.expect("an answer");
    let again = service.chat(with(11, 8)).await.expect("an answer");
    let other = service.chat(with(12, 8)).await.expect("an answer");
    let indices: Vec<u32> = first.choices.iter().map(|choice| choice.index).collect();
    assert_eq!(indices, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert!(contents(&first).iter().collect::<BTreeSet<_>>().len() >= 3, "{:?}", contents(&first));
    assert_eq!(contents(&first), contents(&again));
    assert_ne!(contents(&first), contents(&other));
    let alone = service.chat(with(11, 1)).await.expect("an answer");
    assert_eq!(contents(&alone)[0], contents(&first)[0], "the first of many is the same as one alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_answer_before_itself() {
    let service = Service::start();
    let client = &service.client;
    let ask = |with: Value| async move { client.completions().create(completion_request(with)).await };
    let whole = ask(json!({"max_tokens": 24})).await.expect("an answer").choices[0].text.clone();
    assert!(whole.chars().count() > 5, "{whole:?}");
    let stop: String = whole.chars().skip(2).take(3).collect();
    let before = whole.split(&stop).next().expect("a first part");
    for stop in [json!(stop), json!(["never there", stop])] {
        let answer = ask(json!({"max_tokens": 24, "stop": stop})).await.expect("an answer");
        assert_eq!(answer.choices[0].text, before);
        let reason = format!("{:?}", answer.choices[0].finish_reason);
        assert_eq!(reason, "Some(Stop)");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_echo_take_lists_and_count() {
    let service = Service::start();
    let client = &service.client;
    let ask = |with: Value| async move { client.completions().create(completion_request(with)).await };
    let plain = ask(json!({})).await.expect("an answer");
    let echoed = ask(json!({"echo": true, "logprobs": 2})).await.expect("an answer");
    assert_eq!(echoed.choices[0].text, format!("The capital of France is{}", plain.choices[0].text));
    let logprobs = echoed.choices[0].logprobs.as_ref().expect("logprobs");
    assert_eq!(logprobs.tokens.len(), logprobs.token_logprobs.len());
    assert_eq!(logprobs.token_logprobs[0], None, "nothing comes before the first token");
    assert!(logprobs.token_logprobs[1..].iter().all(Option::is_some));
    let usage = echoed.usage.expect("usage");
    // The end of sequence is generated and counted, but is no text.
    assert_eq!(format!("{:?}", echoed.choices[0].finish_reason), "Some(Stop)");
    assert_eq!(logprobs.tokens.len() as u32 + 1, usage.prompt_tokens + usage.completion_tokens);

    let list =
        ask(json!({"prompt": ["The capital of France is", "12+34="], "n": 2})).await.expect("an answer");
    assert_eq!(list.choices.iter().map(|choice| choice.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(list.choices[0].text, plain.choices[0].text);
    assert_ne!(list.choices[2].text, plain.choices[0].text);

    let mut stream =
        service.client.completions().create_stream(completion_request(json!({}))).await.expect("a stream");
    let mut text = String::new();
    while let Some(chunk) = stream.next().await {
        chunk.expect("a chunk").choices.iter().for_each(|choice| text.push_str(&choice.text));
    }
    assert_eq!(text, plain.choices[0].text);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_and_shown() {
    let service = Service::start();
    let list = service.client.models().list().await.expect("a list");
    assert_eq!(list.object, "list");
    assert_eq!(list.data.iter().map(|model| model.id.as_str()).collect::<Vec<_>>(), [MODEL]);
    let model = service.client.models().retrieve(MODEL).await.expect("a model");
    assert_eq!((model.id.as_str(), model.object.as_str()), (MODEL, "model"));
    let error = api_error(service.client.models().retrieve("gpt-9").await);
    assert_eq!(error.status_code.as_u16(), 404);
    assert_eq!(error.api_error.code.as_deref(), Some("model_not_found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_name_the_field_at_fault() {
    let service = Service::start();
    let unknown = api_error(service.chat(json!({"model": "gpt-9"})).await);
    assert_eq!(unknown.status_code.as_u16(), 404);
    assert_eq!(unknown.api_error.code.as_deref(), Some("model_not_found"));
    assert_eq!(unknown.api_error.param.as_deref(), Some("model"));
    let wrong = [
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"top_p": -0.1}), "top_p"),
        (json!({"n": 0}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_completion_tokens": 100_000}), "max_completion_tokens"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"messages": []}), "messages"),
        (json!({"stop": [""]}), "stop"),
        (json!({"logit_bias": {"97": 101}}), "logit_bias"),
        (json!({"logit_bias": {"100000": 1}}), "logit_bias"),
        (json!({"tool_choice": "required"}), "tool_choice"),
    ];
    for (with, param) in wrong {
        let error = api_error(service.chat(with.clone()).await);
        assert_eq!(error.status_code.as_u16(), 400, "{with}");
        assert_eq!(error.api_error.param.as_deref(), Some(param), "{with}: {}", error.api_error.message);
        assert_eq!(error.api_error.r#type.as_deref(), Some("invalid_request_error"), "{with}");
    }
}
