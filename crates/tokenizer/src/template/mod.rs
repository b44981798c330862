//! Chat templates, rendered as Transformers renders them.
//!
//! The reference is `apply_chat_template`: an immutable sandboxed Jinja environment with `trim_blocks`,
//! `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now` and a `tojson` that is Python's `json.dumps`.

mod limits;
mod markup;
mod prepare;
mod python;
mod time;

pub use time::TemplateTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use prepare::Accepts;
use serde_json::{Map, Value as Json};
use std::borrow::Cow;
use std::sync::Arc;

/// Instructions that one rendering may take: thousands of messages need less, and it is about half a second of work.
const FUEL: u64 = 10_000_000;

/// Why a chat could not be rendered. All but [`TemplateError::Syntax`] and [`TemplateError::Failed`] are the
/// client's to mend.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TemplateError {
    /// The template itself is broken.
    #[error("the chat template does not compile: {0}")]
    Syntax(String),
    /// The template refused the conversation with `raise_exception`.
    #[error("the model's chat template refuses this conversation: {0}")]
    Raised(String),
    /// The conversation does not fit the template.
    #[error("the model's chat template cannot render this conversation: {0}")]
    Failed(String),
    /// Rendering took too many steps.
    #[error("rendering the conversation takes too long: send fewer messages or tools")]
    OutOfFuel,
    /// The messages are not a list of objects.
    #[error("messages must be a list of objects with `role` and `content`; element {index} is not")]
    NotAMessage {
        /// Which element.
        index: usize,
    },
    /// A part of a message's content is of a kind that this model does not take.
    #[error("messages[{message}].content[{part}] has type `{kind}`: this model takes only `text` parts")]
    UnsupportedPart {
        /// Which message.
        message: usize,
        /// Which part.
        part: usize,
        /// Its `type`.
        kind: String,
    },
    /// An extra argument would overwrite one of the template's own variables.
    #[error("chat_template_kwargs may not set `{0}`: leave it out")]
    ReservedArgument(String),
}

/// What a chat is rendered from.
#[derive(Debug, Clone, Copy)]
pub struct RenderInput<'a> {
    /// The conversation, as in the HTTP API.
    pub messages: &'a Json,
    /// The tools on offer, as in the HTTP API.
    pub tools: Option<&'a Json>,
    /// End with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Extra variables (`enable_thinking`, …).
    pub kwargs: &'a Map<String, Json>,
    /// The time that `strftime_now` shows.
    pub now: TemplateTime,
}

/// A checkpoint's chat template, compiled. Cloning shares it.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    special_tokens: Map<String, Json>,
    has_tool_template: bool,
    accepts: Accepts,
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
const RESERVED: [&str; 8] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "chat_template",
    "strftime_now",
    "raise_exception",
    "tokenize",
];

/// Carries the text of `raise_exception` through the engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Compiles a template, with a second one for requests with tools where the checkpoint has that.
    /// `special_tokens` are the variables `bos_token`, `eos_token` and so on.
    pub fn new(
        source: &str,
        tool_source: Option<&str>,
        special_tokens: Map<String, Json>,
    ) -> Result<ChatTemplate, TemplateError> {
        let mut env = environment();
        [Some(source), tool_source].into_iter().flatten().try_for_each(limits::check_source)?;
        let all = || [Some(source), tool_source].into_iter().flatten();
        // Jinja's other way to join strings, `~`, gives plain text; a template that uses it needs no markup.
        if all().any(|source| source.contains("safe")) && !all().any(|source| source.contains(" ~ ")) {
            env.add_filter("safe", markup::safe);
            env.set_formatter(markup::print);
        }
        let sources = [(DEFAULT, Some(source)), (TOOL_USE, tool_source)];
        for (name, source) in sources {
            if let Some(source) = source {
                let source = python::without_generation_tags(source);
                limits::guarded(|| {
                    env.add_template_owned(name, source).map_err(|e| TemplateError::Syntax(describe(&e)))
                })?;
            }
        }
        let mut template = ChatTemplate {
            env: Arc::new(env),
            special_tokens,
            has_tool_template: tool_source.is_some(),
            accepts: Accepts::default(),
        };
        template.accepts = Accepts::probe(&template);
        Ok(template)
    }

    /// Renders a chat as the HTTP API gives it. Before that, content given as text parts becomes one string and
    /// the arguments of past tool calls become objects, where the template expects those.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String, TemplateError> {
        let messages = prepare::prepare(input.messages, self.accepts)?;
        self.render_as_is(&RenderInput { messages: &messages, ..*input })
    }

    /// Renders without touching the messages: exactly what Transformers does.
    pub fn render_as_is(&self, input: &RenderInput<'_>) -> Result<String, TemplateError> {
        if let Some(name) = input.kwargs.keys().find(|name| self.is_reserved(name)) {
            return Err(TemplateError::ReservedArgument(name.clone()));
        }
        let tools = input.tools.filter(|tools| tools.as_array().is_none_or(|list| !list.is_empty()));
        let name = if tools.is_some() && self.has_tool_template { TOOL_USE } else { DEFAULT };
        let now = input.now;
        let own = context! {
            messages => engine_value(input.messages),
            tools => tools.map_or(Value::from(()), engine_value),
            documents => (),
            add_generation_prompt => input.add_generation_prompt,
            strftime_now => Value::from_function(move |format: Cow<'_, str>| now.format(&format)),
        };
        let context = context! {
            ..own,
            ..engine_value(input.kwargs),
            ..engine_value(&self.special_tokens),
        };
        let template = self.env.get_template(name).map_err(|e| TemplateError::Syntax(describe(&e)))?;
        limits::guarded(|| limits::render(&template, context))
    }

    fn is_reserved(&self, name: &str) -> bool {
        RESERVED.contains(&name) || self.special_tokens.contains_key(name)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("accepts", &self.accepts).finish_non_exhaustive()
    }
}

fn engine_value<T: serde::Serialize>(value: T) -> Value {
    Value::from(Serde(value))
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    // Building fails only for clashing delimiters, and these are the default ones.
    env.set_syntax(syntax.build().unwrap_or_default());
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(python::unknown_method);
    env.set_fuel(Some(FUEL));
    limits::bound_filters(&mut env);
    env.add_filter("tojson", python::tojson);
    env.add_filter("int", python::int);
    env.add_filter("float", python::float);
    env.add_test("iterable", python::is_iterable);
    env.add_function("raise_exception", |message: Cow<'_, str>| -> Result<Value, Error> {
        let text = message.into_owned();
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(text)))
    });
    env
}

fn classify(error: &Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(text)) = current.downcast_ref::<Raised>() {
            return TemplateError::Raised(text.clone());
        }
        if current.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel) {
            return TemplateError::OutOfFuel;
        }
        cause = current.source();
    }
    TemplateError::Failed(describe(error))
}

fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    if let Some(line) = error.line() {
        text.push_str(&format!(" (line {line} of the template)"));
    }
    text
}
