//! `/v1/responses`: answers that can be stored, go on in the background, and be followed from any event at any gateway.
//!
//! Layout: [`request`] (the body, and all that is decided when it comes), `items` (conversations as items and as messages), `events` (what
//! the tokens become; numbered), `object` (the response itself), `driver` (a task per response), `live` (its events, and who listens),
//! `stored` (what outlives it), [`replay`] (the same once more).
//!
//! A response is its request: the tokens follow from it, whoever computes them, and the events follow from the tokens. So a gateway that takes a
//! response up where another one was lost sends the very events that the other would have sent.

mod driver;
mod events;
mod items;
mod live;
mod object;
pub(crate) mod replay;
mod request;
mod stored;

use super::error::ApiError;
use super::respond::{add_headers, read_body};
use super::sse;
use crate::access::Caller;
use crate::app::{App, ForCaller, unix_seconds};
use crate::context::RequestContext;
use crate::scheduler_client::CallError;
use ashlar_protocol::admin::{AdminReply, AdminRequest};
use ashlar_protocol::responses::{ResponseCall, ResponseRecord};
use ashlar_store::blobs::Blobs;
use ashlar_vocabulary::{BlobId, RequestId};
use axum::extract::{Path, Query, Request};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use driver::{Drive, Role, adopt, new_id, of_record};
use live::{Ended, Listener, Live};
use object::status_word;
use request::{Prepared, StoredRequest};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Responses that may wait to be taken up.
pub(crate) const ADOPTIONS_WAITING_MAX: usize = 256;
const PREFIX: &str = "resp_";
/// How long the answer to a cancellation waits for what had been said until then.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The responses that this gateway drives, and where they are stored.
pub(crate) struct Responses {
    blobs: Option<Blobs>,
    live: Mutex<BTreeMap<RequestId, Arc<Live>>>,
    max: usize,
}

impl std::fmt::Debug for Responses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Responses")
    }
}

impl Responses {
    /// Drives at most `max` at once; without blobs none is stored.
    pub(crate) fn new(blobs: Option<Blobs>, max: usize) -> Responses {
        Responses { blobs, live: Mutex::new(BTreeMap::new()), max }
    }

    fn can_store(&self) -> bool {
        self.blobs.is_some()
    }

    fn blobs(&self) -> Option<&Blobs> {
        self.blobs.as_ref()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<RequestId, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stored response that is driven here, if the caller may see it.
    fn live(&self, id: RequestId, caller: &Caller) -> Option<Arc<Live>> {
        let visible = |live: &&Arc<Live>| live.stored_for.as_ref().is_some_and(|owner| caller.sees(owner));
        self.all().get(&id).filter(visible).cloned()
    }

    /// The response, which is new to this gateway or not.
    fn enter(&self, id: RequestId, make: impl FnOnce() -> Arc<Live>) -> Result<(Arc<Live>, bool), ApiError> {
        let mut all = self.all();
        if let Some(live) = all.get(&id) {
            return Ok((live.clone(), false));
        }
        if all.len() >= self.max {
            return Err(ApiError::too_many("too many responses are in progress: retry in a moment"));
        }
        let live = make();
        all.insert(id, live.clone());
        Ok((live, true))
    }

    fn leave(&self, id: RequestId) {
        self.all().remove(&id);
    }
}

/// Takes up what the scheduler offers.
pub(crate) async fn take_up(app: Arc<App>, mut offered: mpsc::Receiver<Box<ResponseRecord>>) {
    while let Some(record) = offered.recv().await {
        adopt(&app, *record).await;
    }
}

fn response_name(id: RequestId) -> String {
    format!("{PREFIX}{id}")
}

fn id_of(name: &str) -> Result<RequestId, ApiError> {
    let digits = name.strip_prefix(PREFIX).filter(|digits| digits.len() == 32);
    let id = digits.and_then(|digits| u128::from_str_radix(digits, 16).ok()).map(RequestId);
    id.filter(|id| response_name(*id) == name).ok_or_else(|| not_found(name))
}

fn not_found(name: &str) -> ApiError {
    let shown: String = name.chars().take(64).collect();
    ApiError::not_found(format!("no response with the id {shown}"), "not_found")
}

/// `POST /v1/responses`.
pub(crate) async fn create(
    ForCaller(app): ForCaller,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body = read_body(&app, &parts.headers, body).await?;
    app.first_contact().await;
    app.check_refusals(&body)?;
    let body = app.work(move || object_of(&body)).await?;
    let prior = match request::previous(&body)? {
        Some(name) => prior(&app, name).await?,
        None => Vec::new(),
    };
    let id = new_id();
    let stored = StoredRequest { id, created_at: unix_seconds(), seed: None, served: None, prior, body };
    let worker = app.clone();
    let prepared = app.work(move || Prepared::new(stored, &worker)).await?;
    let params = &prepared.request.sampling.params;
    let (seed, unknown) = (params.seed, prepared.request.unknown.clone());
    context.record(&prepared.served.name, params, prepared.request.max_tokens.unwrap_or(0));
    let (stream, background) = (prepared.request.delivery.stream, prepared.background);
    let in_progress = prepared.object.in_progress();
    let request = announce(&app, &prepared).await?;
    let (traceparent, role) = (context.traceparent.clone(), Role::Owner);
    let drive =
        Drive { app: app.clone(), prepared, role, request, computed_as: id, is_known: false, traceparent };
    let mut listener = drive.start(0)?;
    let mut response = match (stream, background) {
        (true, background) => {
            if !background {
                // A failure before the first output still has its HTTP status.
                let begun = timeout(app.config.keep_alive(), listener.begun()).await;
                begun.unwrap_or(Ok(()))?;
            }
            stream_of(&app, listener)
        }
        (false, true) => Json(in_progress).into_response(),
        (false, false) => match listener.ended().await {
            Some(Ended::With(object)) => Json(&*object).into_response(),
            Some(Ended::Failed(error, _)) => return Err(error),
            Some(Ended::HandedOver) | None => {
                return Err(ApiError::unavailable(format!(
                    "this server is shutting down: another one goes on with {}",
                    response_name(id)
                )));
            }
        },
    };
    add_headers(&mut response, &unknown, seed);
    Ok(response)
}

/// What becomes of a body that follows no other response, up to the point where the cluster is asked.
pub(crate) fn try_body(body: &[u8], app: &App) -> Result<(), ApiError> {
    let body = object_of(body)?;
    request::previous(&body)?;
    let stored =
        StoredRequest { id: new_id(), created_at: 0, seed: None, served: None, prior: Vec::new(), body };
    Prepared::new(stored, app).map(drop)
}

fn object_of(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    // For the error's words alone.
    super::fields::Fields::parse(body)?;
    serde_json::from_slice(body).map_err(|error| ApiError::invalid(error.to_string()))
}

/// The conversation that a response continues.
async fn prior(app: &App, name: &str) -> Result<Vec<Value>, ApiError> {
    let at_fault = |error| ApiError { param: Some("previous_response_id".to_owned()), ..error };
    let record = record(app, id_of(name).map_err(at_fault)?).await.map_err(at_fault)?;
    if record.outcome.is_none() {
        let message = format!("{name} is still in progress: wait for its end");
        return Err(ApiError::field("previous_response_id", message));
    }
    stored::conversation(app, &record).await
}

/// Stores a request that is to be stored. The scheduler hears of it before a client does that goes away.
async fn announce(app: &App, prepared: &Prepared) -> Result<Option<BlobId>, ApiError> {
    if !prepared.store {
        return Ok(None);
    }
    let request = stored::write_request(app, &prepared.stored).await?;
    let (id, created_at) = (prepared.stored.id, prepared.stored.created_at);
    let background = prepared.background;
    let (owner, key) = (app.caller.owner(), app.caller.key_id());
    let record = ResponseRecord { id, created_at, background, request, outcome: None, owner, key };
    let put = AdminRequest::Response(ResponseCall::Put(record));
    let told = call_patiently(app, put).await;
    told.map(|_| Some(request))
}

/// A call that is safe to repeat, which a scheduler that is away for a moment does not fail.
async fn call_patiently(app: &App, request: AdminRequest) -> Result<AdminReply, ApiError> {
    loop {
        let mut link = app.scheduler.watch();
        let epoch = link.borrow().epoch;
        match app.scheduler.call(request.clone()).await {
            Err(CallError::Unavailable(_)) => {
                let back = link.wait_for(|link| link.given_up || link.connected && link.epoch != epoch).await;
                if back.map_or(true, |link| link.given_up) {
                    return Err(ApiError::unavailable("the scheduler is away: retry in a moment"));
                }
            }
            done => return Ok(done?),
        }
    }
}

async fn record(app: &App, id: RequestId) -> Result<ResponseRecord, ApiError> {
    match call_patiently(app, AdminRequest::Response(ResponseCall::Get(id))).await? {
        AdminReply::Response(record) => Ok(record),
        _ => Err(ApiError::internal("the scheduler answered something else")),
    }
}

/// `GET /v1/responses/{id}`.
pub(crate) async fn show(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, ApiError> {
    let id = id_of(&name)?;
    let streams = match query.get("stream").map(String::as_str) {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err(ApiError::field("stream", "`stream` must be true or false")),
    };
    let next = match query.get("starting_after") {
        None => 0,
        Some(_) if !streams => {
            return Err(ApiError::field("starting_after", "`starting_after` needs `stream=true`"));
        }
        Some(number) => match number.parse::<u32>() {
            Ok(number) => number as usize + 1,
            Err(_) => {
                return Err(ApiError::field(
                    "starting_after",
                    "`starting_after` must be the number of an event",
                ));
            }
        },
    };
    app.first_contact().await;
    if streams {
        return follow(&app, id, next).await;
    }
    Ok(Json(object_now(&app, id).await?).into_response())
}

/// The response as it is now.
async fn object_now(app: &Arc<App>, id: RequestId) -> Result<Value, ApiError> {
    if let Some(live) = app.responses.live(id, &app.caller) {
        let ended = timeout(Duration::ZERO, live.listen(0).ended()).await.ok().flatten();
        return Ok(match ended {
            Some(Ended::With(object) | Ended::Failed(_, object)) => (*object).clone(),
            Some(Ended::HandedOver) | None => live.in_progress.clone(),
        });
    }
    let record = record(app, id).await?;
    if let Some(answer) = stored::answer(app, &record).await? {
        return Ok(answer.object);
    }
    let prepared = stored::prepared(app, &record).await?;
    Ok(match record.outcome {
        None => prepared.object.in_progress(),
        Some(outcome) => prepared.object.ended(outcome.status, Vec::new(), None, None),
    })
}

/// Sends the events from number `next` on: those that there are, and those to come.
async fn follow(app: &Arc<App>, id: RequestId, next: usize) -> Result<Response, ApiError> {
    if let Some(live) = app.responses.live(id, &app.caller) {
        return Ok(stream_of(app, live.listen(next)));
    }
    let record = record(app, id).await?;
    if let Some(answer) = stored::answer(app, &record).await? {
        let frames = answer.frames.into_iter().skip(next);
        return Ok(sse::response(futures::stream::iter(frames)));
    }
    if let Some(outcome) = record.outcome {
        let status = status_word(outcome.status);
        let message = format!("this response is {status} and has no events: read it without `stream`");
        return Err(ApiError::field("stream", message));
    }
    let prepared = stored::prepared(app, &record).await?;
    let (request, role) = (Some(record.request), Role::Follower);
    let drive = Drive {
        app: of_record(app, &record),
        prepared,
        role,
        request,
        computed_as: id,
        is_known: true,
        traceparent: None,
    };
    Ok(stream_of(app, drive.start(next)?))
}

fn stream_of(app: &App, listener: Listener) -> Response {
    let keep_alive = app.config.keep_alive();
    sse::response(futures::stream::unfold(listener, move |mut listener| async move {
        match timeout(keep_alive, listener.next()).await {
            Ok(Some(frame)) => Some((frame, listener)),
            Ok(None) => None,
            Err(_) => Some((sse::keep_alive(), listener)),
        }
    }))
}

/// `DELETE /v1/responses/{id}`.
pub(crate) async fn delete(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let id = id_of(&name)?;
    app.first_contact().await;
    app.scheduler.call(AdminRequest::Response(ResponseCall::Delete(id))).await?;
    Ok(Json(json!({"id": name, "object": "response", "deleted": true})))
}

/// `POST /v1/responses/{id}/cancel`.
pub(crate) async fn cancel(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let id = id_of(&name)?;
    app.first_contact().await;
    let record = record(&app, id).await?;
    if !record.background {
        let message = "only a response in the background can be cancelled: close the connection of this one";
        return Err(ApiError::invalid(message));
    }
    if record.outcome.is_none() {
        app.scheduler.call(AdminRequest::Response(ResponseCall::Cancel(id))).await?;
        if let Some(live) = app.responses.live(id, &app.caller) {
            let _ = timeout(LAST_WORDS, live.listen(0).ended()).await;
        }
    }
    Ok(Json(object_now(&app, id).await?))
}

/// `GET /v1/responses/{id}/input_items`.
pub(crate) async fn input_items(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, ApiError> {
    let id = id_of(&name)?;
    app.first_contact().await;
    let StoredRequest { mut prior, body, .. } = stored::request(&app, &record(&app, id).await?).await?;
    prior.append(&mut request::own_items(&body)?);
    let mut items = items::named(&prior, &id.to_string());
    if query.get("order").map(String::as_str) != Some("asc") {
        items.reverse();
    }
    if let Some(after) = query.get("after") {
        let place = items.iter().position(|item| item["id"] == **after);
        let place =
            place.ok_or_else(|| ApiError::field("after", "`after` names no item of this response"))?;
        items.drain(..=place);
    }
    let limit = query.get("limit").map_or(Ok(20), |limit| limit.parse::<usize>());
    let limit = limit.ok().filter(|limit| (1..=100).contains(limit));
    let limit = limit.ok_or_else(|| ApiError::field("limit", "`limit` must be between 1 and 100"))?;
    let has_more = items.len() > limit;
    items.truncate(limit);
    let end = |item: Option<&Value>| item.map(|item| item["id"].clone());
    Ok(Json(json!({
        "object": "list", "first_id": end(items.first()), "last_id": end(items.last()), "has_more": has_more, "data": items,
    })))
}
