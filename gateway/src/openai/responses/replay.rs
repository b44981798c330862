//! A stored response computed once more, and compared with what it was: event by event, byte by byte.

use super::driver::{Drive, Role, new_id};
use super::live::Ended;
use super::{id_of, record, stored};
use crate::app::ForCaller;
use crate::openai::error::ApiError;
use axum::Json;
use axum::extract::Path;
use bytes::Bytes;
use serde_json::{Value, json};

/// Depends on what was computed before, and is none of the model's words.
const CACHED: &str = "/response/usage/input_tokens_details";

/// `POST /v1/responses/{id}/replay`. Answers when the response has been computed again; nothing of it is stored.
pub(crate) async fn replay(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let id = id_of(&name)?;
    app.first_contact().await;
    let record = record(&app, id).await?;
    let answer = stored::answer(&app, &record).await?.ok_or_else(|| {
        ApiError::conflict(format!(
            "{name} has no answer that could be compared: it is in progress, or was cut short"
        ))
    })?;
    let status = answer.object["status"].as_str().unwrap_or_default();
    if !["completed", "incomplete"].contains(&status) {
        let message = format!("{name} is {status}: what depends on when that happened cannot be repeated");
        return Err(ApiError::conflict(message));
    }
    let prepared = stored::prepared(&app, &record).await?;
    let (request, computed_as, role) = (None, new_id(), Role::Owner);
    let drive =
        Drive { app: app.clone(), prepared, role, request, computed_as, is_known: false, traceparent: None };
    let mut listener = drive.start(0)?;
    match listener.ended().await {
        Some(Ended::With(_)) => {}
        Some(Ended::Failed(error, _)) => return Err(error),
        Some(Ended::HandedOver) | None => return Err(ApiError::unavailable("this server is shutting down")),
    }
    let difference = first_difference(&answer.frames, &listener.all_frames());
    Ok(Json(json!({
        "object": "response.replay",
        "id": name,
        "identical": difference.is_none(),
        "events": answer.frames.len(),
        "first_difference": difference,
    })))
}

/// The first event that is another one, and both sides of it; one of them is null where there are fewer.
fn first_difference(stored: &[Bytes], again: &[Bytes]) -> Option<Value> {
    let place = (0..stored.len().max(again.len())).find(|place| {
        let (stored, again) = (stored.get(*place), again.get(*place));
        stored != again && comparable(stored) != comparable(again)
    })?;
    let shown = |frames: &[Bytes]| frames.get(place).map(data_of);
    Some(json!({"sequence_number": place, "stored": shown(stored), "again": shown(again)}))
}

fn comparable(frame: Option<&Bytes>) -> Option<Value> {
    let mut data = data_of(frame?);
    if let Some(cached) = data.pointer_mut(CACHED) {
        *cached = Value::Null;
    }
    Some(data)
}

fn data_of(frame: &Bytes) -> Value {
    let text = String::from_utf8_lossy(frame);
    let data = text.lines().find_map(|line| line.strip_prefix("data: "));
    data.and_then(|data| serde_json::from_str(data).ok()).unwrap_or(Value::Null)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn frame(text: &str, cached: u32) -> Bytes {
        let usage = json!({"input_tokens_details": {"cached_tokens": cached}});
        let data = json!({"delta": text, "response": {"usage": usage}});
        Bytes::from(format!("event: x\ndata: {data}\n\n"))
    }

    #[test]
    fn a_difference_is_found_and_what_was_cached_is_none() {
        let stored = [frame("a", 0), frame("b", 0)];
        assert_eq!(first_difference(&stored, &[frame("a", 0), frame("b", 7)]), None);
        let other = first_difference(&stored, &[frame("a", 0), frame("c", 0)]).unwrap();
        assert_eq!((&other["sequence_number"], &other["again"]["delta"]), (&json!(1), &json!("c")));
        let shorter = first_difference(&stored, &stored[..1]).unwrap();
        assert_eq!((&shorter["sequence_number"], &shorter["again"]), (&json!(1), &Value::Null));
    }
}
