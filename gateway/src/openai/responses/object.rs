//! The response object.

use crate::generation::TokenCounts;
use ashlar_protocol::responses::ResponseStatus;
use serde_json::{Value, json};

/// What every state of a response repeats.
#[derive(Debug, Clone)]
pub(super) struct ResponseObject(Value);

/// Token counts of a response.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct ResponseUsage {
    pub(super) counts: TokenCounts,
    pub(super) reasoning: usize,
}

/// Why a response has failed.
#[derive(Debug, Clone)]
pub(super) struct ResponseError {
    pub(super) code: &'static str,
    pub(super) message: String,
}

impl ResponseObject {
    /// Of a response in progress, with every field.
    pub(super) fn new(in_progress: Value) -> ResponseObject {
        ResponseObject(in_progress)
    }

    /// While it is in progress.
    pub(super) fn in_progress(&self) -> Value {
        self.0.clone()
    }

    /// Once it has ended.
    pub(super) fn ended(
        &self,
        status: ResponseStatus,
        output: Vec<Value>,
        usage: Option<ResponseUsage>,
        error: Option<&ResponseError>,
    ) -> Value {
        let mut object = self.0.clone();
        object["status"] = Value::from(status_word(status));
        object["output"] = Value::Array(output);
        if status == ResponseStatus::Incomplete {
            object["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        if let Some(ResponseUsage { counts, reasoning }) = usage {
            object["usage"] = json!({
                "input_tokens": counts.prompt,
                "input_tokens_details": {"cached_tokens": counts.cached},
                "output_tokens": counts.generated,
                "output_tokens_details": {"reasoning_tokens": reasoning},
                "total_tokens": counts.prompt + counts.generated,
            });
        }
        if let Some(ResponseError { code, message }) = error {
            object["error"] = json!({"code": code, "message": message});
        }
        object
    }
}

/// OpenAI's word.
pub(super) fn status_word(status: ResponseStatus) -> &'static str {
    match status {
        ResponseStatus::Completed => "completed",
        ResponseStatus::Incomplete => "incomplete",
        ResponseStatus::Failed => "failed",
        ResponseStatus::Cancelled => "cancelled",
    }
}
