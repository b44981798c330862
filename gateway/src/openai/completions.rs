//! `POST /v1/completions`.

use super::completions_logprobs::LegacyLogprobs;
use super::completions_request::{CompletionRequest, Prompt};
use super::completions_stream::CompletionStream;
use super::error::ApiError;
use super::respond::{AnswerHead, add_headers, check_min_tokens, finish_reason, read_body, token_budget};
use super::stream;
use super::usage::{receipt_json, usage_json};
use crate::app::{App, ForCaller};
use crate::context::RequestContext;
use crate::generation::{Generation, GenerationSpec, Output, PromptSpec, TokenCounts};
use crate::models;
use crate::text::ModelText;
use crate::transcript::{End, OutputToken};
use ashlar_protocol::serving::FinishReason;
use ashlar_tokenizer::{SpecialTokens, TextStart};
use ashlar_vocabulary::TokenLogprobs;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};

/// What the answer's form depends on.
#[derive(Debug)]
pub(crate) struct CompletionForm {
    pub(crate) head: AnswerHead,
    pub(crate) prompts: Vec<Prompt>,
    /// Choices per prompt.
    pub(crate) n: usize,
    pub(crate) echo: bool,
    /// Whether the answer is the echo alone (`max_tokens` 0).
    pub(crate) echo_only: bool,
    /// Whether log-probabilities are asked for.
    pub(crate) logprobs: bool,
}

pub(crate) async fn completions(
    ForCaller(app): ForCaller,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body = read_body(&app, &parts.headers, body).await?;
    app.first_contact().await;
    let app = models::of_body(app, &body).await?;
    app.check_refusals(&body)?;
    let worker = app.clone();
    let (request, served) = app
        .work(move || {
            let request = CompletionRequest::parse(&body, &worker.text, &worker.config)?;
            let served = worker.served(request.model.as_deref())?;
            if let Some(grammar) = &request.grammar {
                worker.text.check_grammar(grammar, "response_format")?;
            }
            Ok((request, served))
        })
        .await?;

    let cluster = app.cluster()?;
    // Somebody has to compute the prompt even where nothing is to follow it; the token is then dropped.
    let max_tokens = request.max_tokens.max(1);
    let mut prompts = Vec::with_capacity(request.prompts.len());
    for prompt in &request.prompts {
        let budget = token_budget(
            cluster.max_context_tokens,
            prompt.tokens.len(),
            Some(max_tokens),
            "max_tokens",
            "prompt",
        )?;
        check_min_tokens(request.sampling.params.min_tokens, budget)?;
        prompts.push(PromptSpec { tokens: prompt.tokens.as_slice().into(), max_new_tokens: budget });
    }
    let mut sampling = request.sampling;
    let seed = sampling.params.seed;
    context.record(&served.name, &sampling.params, max_tokens);
    sampling.params.grammar = request.grammar;
    let form = CompletionForm {
        head: AnswerHead::new(&served, &cluster, "cmpl-", context.id, "text_completion"),
        prompts: request.prompts,
        n: sampling.n as usize,
        echo: request.echo,
        echo_only: request.max_tokens == 0,
        logprobs: request.logprobs.is_some(),
    };
    let spec = GenerationSpec {
        id: context.id,
        adapter: served.adapter,
        prompts,
        n: sampling.n,
        sampling: sampling.params,
        stop_strings: sampling.stop_strings,
        include_stop: sampling.include_stop,
        stop_tokens: sampling.stop_tokens,
        special: if sampling.skip_special_tokens { SpecialTokens::Hide } else { SpecialTokens::Show },
        start: TextStart::Continuation,
        priority: sampling.priority,
        kept: false,
        resumed: false,
        traceparent: context.traceparent.clone(),
    };
    let generation = Generation::start(&app, &cluster, spec)?;
    let mut response = if request.delivery.stream {
        let form = CompletionStream::new(app.clone(), form, request.delivery);
        stream::respond(app, generation, form).await?
    } else {
        collect(&app, generation, form, request.delivery.receipt).await?.into_response()
    };
    add_headers(&mut response, &request.unknown, seed);
    Ok(response)
}

impl CompletionForm {
    pub(crate) fn choices(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// The prompt of a choice.
    pub(crate) fn prompt(&self, choice: usize) -> Option<&Prompt> {
        self.prompts.get(choice / self.n.max(1))
    }

    /// Text that stands before the generated text of a choice.
    pub(crate) fn echoed(&self, choice: usize) -> &str {
        self.prompt(choice).filter(|_| self.echo).map_or("", |prompt| &prompt.text)
    }

    /// The log-probabilities of a choice's echoed prompt, if they are part of the answer.
    pub(crate) fn prompt_logprobs(
        &self,
        choice: usize,
        described: &[Option<TokenLogprobs>],
        text: &ModelText,
    ) -> LegacyLogprobs {
        let mut logprobs = LegacyLogprobs::default();
        if self.logprobs
            && self.echo
            && let Some(prompt) = self.prompt(choice)
        {
            logprobs.add_prompt(&prompt.tokens, described, text);
        }
        logprobs
    }

    /// Token counts of the answer so far.
    pub(crate) fn counts(&self, generation: &Generation) -> TokenCounts {
        let counts = generation.counts();
        if self.echo_only { TokenCounts { generated: 0, ..counts } } else { counts }
    }

    /// Why a choice ended, as the client asked for it.
    pub(crate) fn finish_reason(&self, reason: FinishReason) -> &'static str {
        if self.echo_only { "length" } else { finish_reason(reason) }
    }
}

/// One choice in the making.
#[derive(Default)]
struct Choice {
    text: String,
    tokens: Vec<OutputToken>,
    end: Option<FinishReason>,
}

/// The whole answer at once.
async fn collect(
    app: &App,
    mut generation: Generation,
    form: CompletionForm,
    wants_receipt: bool,
) -> Result<Json<Value>, ApiError> {
    let mut choices: Vec<Choice> = (0..form.choices()).map(|_| Choice::default()).collect();
    while let Some(output) = generation.next().await {
        match output {
            Output::Delta { .. } if form.echo_only => {}
            Output::Delta { choice, delta } => {
                if let Some(choice) = choices.get_mut(choice) {
                    choice.text.push_str(&delta.text);
                    if form.logprobs {
                        choice.tokens.extend(delta.tokens);
                    }
                }
            }
            Output::End { end: End::Failed(failure), .. } => return Err(failure.into()),
            Output::End { choice, end: End::Finished { reason, .. } } => {
                if let Some(choice) = choices.get_mut(choice) {
                    choice.end = Some(reason);
                }
            }
        }
    }
    let shown = choices
        .iter()
        .enumerate()
        .map(|(index, choice)| {
            let echoed = form.echoed(index);
            let logprobs = form.logprobs.then(|| {
                let described = generation.prompt_logprobs(index);
                let mut logprobs = form.prompt_logprobs(index, described, &app.text);
                logprobs.add_generated(&choice.tokens, echoed.chars().count(), &app.text);
                logprobs.json()
            });
            json!({
                "index": index,
                "text": format!("{echoed}{}", choice.text),
                "logprobs": logprobs,
                "finish_reason": choice.end.map(|reason| form.finish_reason(reason)),
            })
        })
        .collect();
    let mut answer = form.head.with_choices(shown);
    answer["usage"] = usage_json(form.counts(&generation));
    if wants_receipt {
        answer["ashlar"] = receipt_json(&generation);
    }
    Ok(Json(answer))
}
