//! `/v1/files`.

use super::download::download;
use super::ids::{file_name, file_of_path, no_such_file, read_file_name};
use super::lists::{QueryFields, list};
use super::{tuning, unexpected};
use crate::app::{App, ForCaller};
use crate::openai::error::ApiError;
use crate::openai::respond::add_warning;
use crate::scheduler_client::CallError;
use ashlar_protocol::admin::{AdminFailureKind, AdminReply, AdminRequest, FileRecord, Page};
use ashlar_vocabulary::FileId;
use axum::Json;
use axum::extract::Path;
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

pub(crate) use super::upload::upload;

/// The purpose of training files.
pub(super) const FINE_TUNE: &str = "fine-tune";
/// Files of a page, by default and at most.
const PAGE_FILES: u32 = 100;
const PAGE_FILES_MAX: u32 = 10_000;
/// Files asked of the scheduler at once.
const CALL_FILES_MAX: u32 = 100;

pub(crate) async fn list_files(ForCaller(app): ForCaller, uri: Uri) -> Result<Response, ApiError> {
    let mut query = QueryFields::parse(&uri)?;
    let mut after = query.after(read_file_name)?;
    let limit = query.limit(PAGE_FILES, PAGE_FILES_MAX)?;
    let purpose = query.take("purpose");
    if query.take("order").is_some_and(|order| order != "desc") {
        return Err(ApiError::field("order", "`order` must be desc: the newest file comes first"));
    }
    tuning(&app)?;
    app.cluster()?;
    let mut data = Vec::new();
    let mut has_more = false;
    'pages: loop {
        let page = Page { after, limit: CALL_FILES_MAX };
        let reply = app.scheduler.call(AdminRequest::ListFiles(page)).await?;
        let AdminReply::Files(files, more) = reply else { return Err(unexpected(&reply)) };
        after = files.last().map(|file| file.id);
        for file in
            files.iter().filter(|file| purpose.as_ref().is_none_or(|purpose| *purpose == file.purpose))
        {
            // One more than asked for shows that there are more.
            if data.len() == limit as usize {
                has_more = true;
                break 'pages;
            }
            data.push(file_object(file));
        }
        if !more || after.is_none() {
            break;
        }
    }
    let mut response = Json(list(data, has_more)).into_response();
    add_warning(response.headers_mut(), &query.unknown());
    Ok(response)
}

pub(crate) async fn show_file(
    ForCaller(app): ForCaller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(file_object(&find(&app, &id).await?)))
}

pub(crate) async fn delete_file(
    ForCaller(app): ForCaller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let file = find(&app, &id).await?;
    match app.scheduler.call(AdminRequest::DeleteFile(file.id)).await {
        Err(CallError::Refused(failure)) if failure.kind == AdminFailureKind::NotFound => {
            Err(no_such_file(&id))
        }
        Err(error) => Err(error.into()),
        // The bytes stay until a sweep: another file may be equal to this one.
        Ok(_) => Ok(Json(json!({"id": file_name(file.id), "object": "file", "deleted": true}))),
    }
}

pub(crate) async fn file_content(
    ForCaller(app): ForCaller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let file = find(&app, &id).await?;
    download(&tuning(&app)?.blobs, file.blob, &file.name).await
}

async fn find(app: &App, name: &str) -> Result<FileRecord, ApiError> {
    tuning(app)?;
    let id = file_of_path(name)?;
    app.cluster()?;
    get_file(app, id).await?.ok_or_else(|| no_such_file(name))
}

/// A file's record; `None` where there is none.
pub(super) async fn get_file(app: &App, id: FileId) -> Result<Option<FileRecord>, ApiError> {
    match app.scheduler.call(AdminRequest::GetFile(id)).await {
        Ok(AdminReply::File(file)) => Ok(Some(file)),
        Ok(reply) => Err(unexpected(&reply)),
        Err(CallError::Refused(failure)) if failure.kind == AdminFailureKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// OpenAI's file object.
pub(super) fn file_object(file: &FileRecord) -> Value {
    json!({
        "id": file_name(file.id),
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": null,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": null,
    })
}
