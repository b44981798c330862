//! Chat, completions, responses, tokens.

use super::{Answer, Body, Field, Kind, Operation, delete, field, get, in_path, in_query, post, required};
use crate::access::Access;

const SUBJECT: &str = "Inference";
const TOKENS_MAX: i64 = u32::MAX as i64;

/// What chooses and bounds the answer of every kind of request.
pub(crate) const SAMPLING: &[Field] = &[
    field(
        "temperature",
        Kind::Number(0.0, 2.0),
        "0 takes the likeliest token; default: the model's own, or 1.",
    ),
    field("top_p", Kind::Number(0.0, 1.0), "Only the likeliest tokens that together have this probability."),
    field("top_k", Kind::Integer(-1, TOKENS_MAX), "Only so many of the likeliest tokens; 0 or -1: all."),
    field(
        "min_p",
        Kind::Number(0.0, 1.0),
        "Only tokens with at least this share of the likeliest one's probability.",
    ),
    field(
        "presence_penalty",
        Kind::Number(-2.0, 2.0),
        "Taken from the logit of each token that the answer has.",
    ),
    field("frequency_penalty", Kind::Number(-2.0, 2.0), "The same, for each time that the answer has it."),
    field(
        "repetition_penalty",
        Kind::Number(0.0, 10.0),
        "Divides the logits of tokens that prompt or answer have; 1: none.",
    ),
    field("logit_bias", Kind::Map, "Token id → what is added to its logit, -100 to 100."),
    field(
        "seed",
        Kind::Integer(i64::MIN, i64::MAX),
        "The same seed, request and model give the same bits, on every layout. The \
        seed of a request without one is told in the header `x-ashlar-seed`.",
    ),
    field("n", Kind::Integer(1, TOKENS_MAX), "Answers to one prompt, each drawn on its own."),
    field("best_of", Kind::Integer(1, TOKENS_MAX), "Only accepted where it equals `n`."),
    field(
        "stop",
        Kind::Any(&[Kind::Text, Kind::List(&Kind::Text)]),
        "The answer ends before the first of these.",
    ),
    field("stop_token_ids", Kind::List(&Kind::Integer(0, TOKENS_MAX)), "Tokens that end the answer."),
    field("include_stop_str_in_output", Kind::Bool, "Whether what ended the answer is part of it."),
    field("ignore_eos", Kind::Bool, "Goes on after the end of the sequence, up to the token limit."),
    field("min_tokens", Kind::Integer(0, TOKENS_MAX), "No end before so many tokens."),
    field(
        "skip_special_tokens",
        Kind::Bool,
        "Whether special tokens are left out of the text; default: yes.",
    ),
    field("user", Kind::Text, "Accepted, and not used."),
    field("priority", Kind::Integer(i32::MIN as i64, i32::MAX as i64), "Lower goes first; default 0."),
];

/// How the answer is delivered.
pub(crate) const DELIVERY: &[Field] = &[
    field("stream", Kind::Bool, "Sends tokens as they come, as server-sent events."),
    field(
        "stream_options",
        Kind::Object(&[
            field("include_usage", Kind::Bool, "One more event at the end, with the token counts."),
            field("continuous_usage_stats", Kind::Bool, "Token counts in every event."),
            field("include_obfuscation", Kind::Bool, "Accepted, and not used."),
        ]),
        "Only where `stream` is true.",
    ),
    field("ashlar_receipt", Kind::Bool, "Adds `ashlar`: where the request's time went, stage by stage."),
];

const FORMAT: &[Field] = &[field(
    "response_format",
    Kind::Object(&[
        required(
            "type",
            Kind::OneOf(&["text", "json_object", "json_schema"]),
            "Text, any JSON object, or JSON of a schema: what does \
        not fit is never sampled.",
        ),
        field(
            "json_schema",
            Kind::Object(&[
                required("schema", Kind::Map, "The JSON Schema."),
                field("name", Kind::Text, "Its name."),
                field("description", Kind::Text, "What it is for."),
                field("strict", Kind::Bool, "Accepted; it always is."),
            ]),
            "For `json_schema`.",
        ),
    ]),
    "What form the answer is to have.",
)];

const TOOLS: &[Field] = &[
    field(
        "tools",
        Kind::List(&Kind::Object(&[
            required("type", Kind::OneOf(&["function"]), "There is no other."),
            required(
                "function",
                Kind::Object(&[
                    required("name", Kind::Text, "Its name."),
                    field("description", Kind::Text, "What it does: the model reads it."),
                    field("parameters", Kind::Map, "JSON Schema of its arguments."),
                    field("strict", Kind::Bool, "Accepted; arguments always fit the schema."),
                ]),
                "The function.",
            ),
        ])),
        "Functions that the model may call.",
    ),
    field(
        "tool_choice",
        Kind::Any(&[Kind::OneOf(&["none", "auto", "required"]), Kind::Map]),
        "Whether it has to, and which.",
    ),
    field("parallel_tool_calls", Kind::Bool, "Whether it may call several at once; default: yes."),
];

pub(crate) const CHAT: &[Field] = &[
    field("model", Kind::Text, "The model or adapter; default: the model."),
    required(
        "messages",
        Kind::List(&Kind::Object(&[
            required(
                "role",
                Kind::OneOf(&["system", "developer", "user", "assistant", "tool"]),
                "Who says it.",
            ),
            field(
                "content",
                Kind::Any(&[Kind::Text, Kind::List(&Kind::Map)]),
                "Text, or parts of type `text`.",
            ),
            field("name", Kind::Text, "A name, for templates that read it."),
            field("tool_calls", Kind::List(&Kind::Map), "What the assistant called."),
            field("tool_call_id", Kind::Text, "Which call a tool answers."),
            field("reasoning_content", Kind::Text, "What the assistant thought."),
        ])),
        "The conversation so far.",
    ),
    field(
        "max_completion_tokens",
        Kind::Integer(1, TOKENS_MAX),
        "The longest answer; default: what the context has room for.",
    ),
    field("max_tokens", Kind::Integer(1, TOKENS_MAX), "The older name of the same."),
    field("logprobs", Kind::Bool, "Tells the log-probability of each token."),
    field("top_logprobs", Kind::Integer(0, 20), "And of so many alternatives."),
    field("add_generation_prompt", Kind::Bool, "Whether the template opens the answer; default: yes."),
    field("chat_template_kwargs", Kind::Map, "More variables for the model's chat template."),
];

pub(crate) const COMPLETION: &[Field] = &[
    field("model", Kind::Text, "The model or adapter; default: the model."),
    required(
        "prompt",
        Kind::Any(&[Kind::Text, Kind::List(&Kind::Text), Kind::List(&Kind::Integer(0, TOKENS_MAX))]),
        "Text, token ids, or a list of either.",
    ),
    field("max_tokens", Kind::Integer(0, TOKENS_MAX), "The longest answer; default 16."),
    field("echo", Kind::Bool, "Begins the answer with the prompt."),
    field("suffix", Kind::Text, "Not supported: refused."),
    field(
        "logprobs",
        Kind::Integer(0, 20),
        "Tells the log-probability of each token and of so many alternatives.",
    ),
    field(
        "add_special_tokens",
        Kind::Bool,
        "Whether the tokenizer adds its special tokens to a text prompt; default: yes.",
    ),
];

pub(crate) const RESPONSE: &[Field] = &[
    field("model", Kind::Text, "The model or adapter; default: the model."),
    required(
        "input",
        Kind::Any(&[Kind::Text, Kind::List(&Kind::Map)]),
        "Text, or items: messages, calls and their outputs.",
    ),
    field("instructions", Kind::Text, "A system message."),
    field("previous_response_id", Kind::Text, "A stored response that this one follows."),
    field("max_output_tokens", Kind::Integer(1, TOKENS_MAX), "The longest answer."),
    field(
        "store",
        Kind::Bool,
        "Keeps the response, so that it outlives gateways and can be fetched; default: yes.",
    ),
    field("background", Kind::Bool, "Answers at once; the response is fetched later."),
    field(
        "text",
        Kind::Object(&[field("format", Kind::Map, "As `response_format` of chats.")]),
        "What form the answer is to have.",
    ),
    field("top_logprobs", Kind::Integer(0, 20), "Alternatives of each token."),
    field("include", Kind::List(&Kind::Text), "More to tell: `message.output_text.logprobs`."),
    field("metadata", Kind::Map, "Kept with it: up to 16 strings."),
    field("truncation", Kind::OneOf(&["auto", "disabled"]), "Input that is too long is refused either way."),
    field("reasoning", Kind::Map, "Accepted, and not used."),
    field("conversation", Kind::Any(&[Kind::Text, Kind::Map]), "Not supported: use `previous_response_id`."),
    field("chat_template_kwargs", Kind::Map, "More variables for the model's chat template."),
];

pub(crate) const CREATE_CHAT: Operation = post(
    SUBJECT,
    "Answer a conversation",
    Body::Json(&[CHAT, SAMPLING, FORMAT, TOOLS, DELIVERY]),
    Answer::JsonOrEvents(r#"{"id": "chatcmpl-…", "object": "chat.completion", "created": 1764000000, "model": "ashlar-demo",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "46"}, "finish_reason": "stop", "logprobs": null}],
        "usage": {"prompt_tokens": 18, "completion_tokens": 3, "total_tokens": 21, "prompt_tokens_details": {"cached_tokens": 0}}}"#),
)
.details("OpenAI's chat completions, with vLLM's additions. Fields that nobody knows are named in the header `x-ashlar-warning`.")
.access(Access::Inference);

pub(crate) const CREATE_COMPLETION: Operation = post(
    SUBJECT,
    "Continue a text",
    Body::Json(&[COMPLETION, SAMPLING, FORMAT, DELIVERY]),
    Answer::JsonOrEvents(
        r#"{"id": "cmpl-…", "object": "text_completion", "created": 1764000000, "model": "ashlar-demo",
        "choices": [{"index": 0, "text": "46", "finish_reason": "stop", "logprobs": null}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 3, "total_tokens": 11}}"#,
    ),
)
.access(Access::Inference);

const RESPONSE_EXAMPLE: &str = r#"{"id": "resp_…", "object": "response", "status": "completed", "model": "ashlar-demo",
    "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "46", "annotations": []}]}]}"#;
const RESPONSE_ID: &[super::Parameter] = &[in_path("id", "The response: `resp_…`.")];

pub(crate) const CREATE_RESPONSE: Operation = post(
    SUBJECT,
    "Answer, and keep the answer",
    Body::Json(&[RESPONSE, SAMPLING, TOOLS, DELIVERY]),
    Answer::JsonOrEvents(RESPONSE_EXAMPLE),
)
.details("OpenAI's responses. A stored one goes on at any gateway when the one that took it dies.")
.access(Access::Inference);

pub(crate) const SHOW_RESPONSE: Operation =
    get(SUBJECT, "A stored response", Answer::JsonOrEvents(RESPONSE_EXAMPLE))
        .parameters(&[
            in_path("id", "The response: `resp_…`."),
            in_query("stream", Kind::Bool, "As server-sent events."),
            in_query(
                "starting_after",
                Kind::Integer(0, i64::MAX),
                "Only events after this `sequence_number`.",
            ),
        ])
        .access(Access::Inference);

pub(crate) const DELETE_RESPONSE: Operation = delete(
    SUBJECT,
    "Forget a stored response",
    Answer::Json(r#"{"id": "resp_…", "object": "response", "deleted": true}"#),
)
.parameters(RESPONSE_ID)
.access(Access::Inference);

pub(crate) const CANCEL_RESPONSE: Operation =
    post(SUBJECT, "Stop a response in the background", Body::None, Answer::Json(RESPONSE_EXAMPLE))
        .parameters(RESPONSE_ID)
        .access(Access::Inference);

pub(crate) const RESPONSE_INPUT: Operation = get(
    SUBJECT,
    "The input of a stored response",
    Answer::Json(r#"{"object": "list", "data": [], "has_more": false}"#),
)
.parameters(RESPONSE_ID)
.access(Access::Inference);

pub(crate) const REPLAY_RESPONSE: Operation = post(
    SUBJECT,
    "Compute a stored response again",
    Body::None,
    Answer::Json(r#"{"id": "resp_…", "same": true}"#),
)
.parameters(RESPONSE_ID)
.details("And compare it with what was answered, byte by byte, whatever the layout is now.")
.access(Access::Inference);

pub(crate) const TOKENIZE: Operation = post(
    SUBJECT,
    "Count and show tokens",
    Body::Json(&[&[
        field("model", Kind::Text, "The model."),
        field("prompt", Kind::Text, "A text, or instead `messages` as for a chat."),
        field("messages", Kind::List(&Kind::Map), "A conversation, instead of `prompt`."),
        field("add_special_tokens", Kind::Bool, "Whether the tokenizer adds its special tokens."),
        field("return_token_strs", Kind::Bool, "Whether `token_strs` has each token's text."),
        field("add_generation_prompt", Kind::Bool, "Whether the template opens the answer."),
        field("chat_template_kwargs", Kind::Map, "More variables for the model's chat template."),
    ]]),
    Answer::Json(r#"{"count": 3, "max_model_len": 512, "tokens": [87, 104, 97]}"#),
)
.access(Access::Inference);

pub(crate) const DETOKENIZE: Operation = post(
    SUBJECT,
    "The text of tokens",
    Body::Json(&[&[
        field("model", Kind::Text, "The model."),
        required("tokens", Kind::List(&Kind::Integer(0, TOKENS_MAX)), "Token ids."),
    ]]),
    Answer::Json(r#"{"prompt": "Wha"}"#),
)
.access(Access::Inference);
