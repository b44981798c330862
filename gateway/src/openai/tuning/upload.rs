//! `POST /v1/files`: a multipart body, streamed to a blob.

use super::files::{FINE_TUNE, file_object};
use super::ids::new_file_id;
use super::tuning;
use crate::app::{App, ForCaller, unix_seconds};
use crate::openai::error::ApiError;
use crate::openai::respond::{add_warning, discard};
use ashlar_protocol::admin::{AdminRequest, FileRecord};
use ashlar_store::blobs::{BlobWriter, Blobs};
use axum::Json;
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use std::time::Duration;

/// An upload that is slower has its place taken away.
const UPLOAD_TIME_MAX: Duration = Duration::from_secs(3600);
/// Parts of a form.
const PARTS_MAX: usize = 16;
/// Bytes of a part that is no file.
const TEXT_BYTES_MAX: usize = 4 << 10;
/// Characters of a file's name.
const NAME_CHARS_MAX: usize = 255;
/// What a form adds to its file.
const FORM_BYTES_MAX: u64 = 64 << 10;
/// Bytes of a refused upload that are read, so that its sender gets the answer.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

pub(crate) async fn upload(ForCaller(app): ForCaller, request: Request) -> Result<Response, ApiError> {
    let checked = check_head(&app, request.headers());
    let timeout = Duration::from_millis(app.config.body_timeout_ms);
    let (app_tuning, place) = match checked {
        Ok(checked) => checked,
        Err(error) => {
            discard(request.into_body(), DISCARDED_BYTES_MAX, timeout).await;
            return Err(error);
        }
    };
    let mut form = form_of(request).await?;
    let reading = Reading { app: &app, blobs: &app_tuning.blobs, timeout, unknown: Vec::new() };
    let read = tokio::time::timeout(UPLOAD_TIME_MAX, reading.form(&mut form)).await;
    let read = read.unwrap_or_else(|_| {
        Err(ApiError::request_timeout("the upload took more than an hour: split the file"))
    });
    let (form_read, unknown) = match read {
        Ok(read) => read,
        Err(error) => {
            // A client that is still sending would meet a closed connection and never read the answer.
            let _ = tokio::time::timeout(timeout, discard_form(form)).await;
            return Err(error);
        }
    };
    let stored = form_read.writer.finish().await?;
    let record = FileRecord {
        id: new_file_id(),
        name: form_read.name,
        purpose: FINE_TUNE.to_owned(),
        bytes: stored.bytes,
        created_at: unix_seconds(),
        blob: stored.id,
        owner: app.caller.owner(),
    };
    app.scheduler.call(AdminRequest::PutFile(record.clone())).await?;
    drop(place);
    let mut response = Json(file_object(&record)).into_response();
    add_warning(response.headers_mut(), &unknown);
    Ok(response)
}

async fn form_of(request: Request) -> Result<Multipart, ApiError> {
    Multipart::from_request(request, &()).await.map_err(|error| {
        ApiError::invalid(format!("the multipart form cannot be read: {}", error.body_text()))
    })
}

/// Reads a form as an upload does, and keeps nothing of it.
pub(crate) async fn try_form(app: &App, request: Request) -> Result<(), ApiError> {
    let blobs = &tuning(app)?.blobs;
    let timeout = Duration::from_millis(app.config.body_timeout_ms);
    let mut form = form_of(request).await?;
    Reading { app, blobs, timeout, unknown: Vec::new() }.form(&mut form).await.map(drop)
}

type Place = tokio::sync::OwnedSemaphorePermit;

/// Refuses what the head shows already.
fn check_head(app: &App, headers: &HeaderMap) -> Result<(crate::tuning::Tuning, Place), ApiError> {
    let tuning = tuning(app)?.clone();
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.to_ascii_lowercase();
    if !kind.starts_with("multipart/form-data") || !kind.contains("boundary=") {
        return Err(ApiError::invalid(
            "a file is uploaded as multipart/form-data with the parts `purpose` and `file`: curl -F purpose=fine-tune \
             -F file=@FILE",
        ));
    }
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|bytes| bytes > app.config.file_bytes_max.saturating_add(FORM_BYTES_MAX)) {
        return Err(too_large(app));
    }
    app.cluster()?;
    let place = tuning
        .uploads
        .clone()
        .try_acquire_owned()
        .map_err(|_| ApiError::too_many("too many uploads at once: retry in a moment"))?;
    Ok((tuning, place))
}

fn too_large(app: &App) -> ApiError {
    let max = app.config.file_bytes_max;
    let message =
        format!("the file exceeds {max} bytes: split it, or ask the operator to raise `file_bytes_max`");
    ApiError { status: StatusCode::PAYLOAD_TOO_LARGE, ..ApiError::field("file", message) }
}

/// A form that is good, its file written and not yet finished.
struct FormRead {
    name: String,
    writer: BlobWriter,
}

struct Reading<'a> {
    app: &'a App,
    blobs: &'a Blobs,
    /// Of a client that sends nothing.
    timeout: Duration,
    unknown: Vec<String>,
}

impl Reading<'_> {
    async fn form(mut self, form: &mut Multipart) -> Result<(FormRead, Vec<String>), ApiError> {
        let (mut purpose, mut file) = (None, None);
        let mut parts = 0;
        while let Some(field) = self.in_time(form.next_field()).await? {
            parts += 1;
            if parts > PARTS_MAX {
                return Err(ApiError::invalid(format!(
                    "the form has more than {PARTS_MAX} parts: send fewer"
                )));
            }
            let name = field.name().unwrap_or_default().to_owned();
            match name.as_str() {
                "purpose" if purpose.is_some() => return Err(twice("purpose")),
                "purpose" => {
                    let text = self.text(field, "purpose").await?;
                    check_purpose(&text)?;
                    purpose = Some(text);
                }
                "file" if file.is_some() => return Err(twice("file")),
                "file" => file = Some(self.file(field).await?),
                _ => {
                    self.text(field, &name).await?;
                    self.unknown.push(name);
                }
            }
        }
        if purpose.is_none() {
            let message = "`purpose` is missing: send a part `purpose` with the text fine-tune";
            return Err(ApiError::field("purpose", message));
        }
        let missing = || ApiError::field("file", "`file` is missing: send the file as a part of this name");
        Ok((file.ok_or_else(missing)?, self.unknown))
    }

    async fn file(&self, mut field: Field<'_>) -> Result<FormRead, ApiError> {
        let Some(name) = field.file_name().map(plain_name).filter(|name| !name.is_empty()) else {
            return Err(ApiError::field("file", "`file` has no file name: send it as a file, with one"));
        };
        let mut writer = self.blobs.writer();
        while let Some(chunk) = self.chunk(&mut field).await? {
            if writer.bytes() + chunk.len() as u64 > self.app.config.file_bytes_max {
                return Err(too_large(self.app));
            }
            writer.write(&chunk).await?;
        }
        match writer.bytes() {
            0 => Err(ApiError::field(
                "file",
                "the file is empty: send one with examples, one JSON object per line",
            )),
            _ => Ok(FormRead { name, writer }),
        }
    }

    /// A short part.
    async fn text(&self, mut field: Field<'_>, name: &str) -> Result<String, ApiError> {
        let mut text = Vec::new();
        while let Some(chunk) = self.chunk(&mut field).await? {
            if text.len() + chunk.len() > TEXT_BYTES_MAX {
                let message = format!("`{name}` exceeds {TEXT_BYTES_MAX} bytes: shorten it");
                return Err(ApiError::field(name, message));
            }
            text.extend_from_slice(&chunk);
        }
        String::from_utf8(text)
            .map_err(|_| ApiError::field(name, format!("`{name}` is not UTF-8: correct it")))
    }

    async fn chunk(&self, field: &mut Field<'_>) -> Result<Option<Bytes>, ApiError> {
        self.in_time(field.chunk()).await
    }

    async fn in_time<T>(&self, next: impl Future<Output = Result<T, MultipartError>>) -> Result<T, ApiError> {
        match tokio::time::timeout(self.timeout, next).await {
            Ok(next) => next.map_err(|error| {
                ApiError::invalid(format!("the multipart form cannot be read: {}", error.body_text()))
            }),
            Err(_) => Err(ApiError::request_timeout(format!(
                "nothing arrived for {} ms: send the file faster",
                self.timeout.as_millis()
            ))),
        }
    }
}

async fn discard_form(mut form: Multipart) {
    let mut left = DISCARDED_BYTES_MAX;
    while let Ok(Some(mut field)) = form.next_field().await {
        while let Ok(Some(chunk)) = field.chunk().await {
            match left.checked_sub(chunk.len()) {
                Some(less) => left = less,
                None => return,
            }
        }
    }
}

fn check_purpose(purpose: &str) -> Result<(), ApiError> {
    if purpose == FINE_TUNE {
        return Ok(());
    }
    let shown: String = purpose.chars().filter(|c| !c.is_control()).take(64).collect();
    Err(ApiError::field(
        "purpose",
        format!("`purpose` must be {FINE_TUNE}, not `{shown}`: other files have no use here"),
    ))
}

fn twice(name: &str) -> ApiError {
    ApiError::field(name, format!("`{name}` is there twice: send one per request"))
}

/// The last part of a path, without what no file should be called.
fn plain_name(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    last.chars().filter(|c| !c.is_control()).take(NAME_CHARS_MAX).collect()
}
