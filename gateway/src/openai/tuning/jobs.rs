//! `/v1/fine_tuning/jobs` and what is below it.

use super::choices::JobForm;
use super::download::download;
use super::files::{FINE_TUNE, get_file};
use super::follow;
use super::ids::{
    job_of_path, new_job_id, no_such_job, read_checkpoint_name, read_event_name, read_job_name,
};
use super::lists::{QueryFields, list};
use super::objects::{checkpoint_object, event_object, job_object};
use super::{tuning, unexpected};
use crate::app::{App, ForCaller, unix_seconds};
use crate::openai::error::ApiError;
use crate::openai::respond::{add_warning, read_body};
use crate::scheduler_client::CallError;
use ashlar_protocol::admin::{
    AdminFailureKind, AdminReply, AdminRequest, JobAction, JobRecord, JobRequest, Page,
};
use ashlar_vocabulary::{FileId, JobId};
use axum::Json;
use axum::extract::{Path, Request};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use uuid::Uuid;

/// Entries of a page, by default and at most.
const PAGE_JOBS: u32 = 20;
const PAGE_EVENTS: u32 = 20;
const PAGE_CHECKPOINTS: u32 = 10;
const PAGE_MAX: u32 = 100;
/// The files of an adapter.
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

pub(crate) async fn create_job(ForCaller(app): ForCaller, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body = read_body(&app, &parts.headers, body).await?;
    tuning(&app)?;
    let cluster = app.cluster()?;
    let (id, context) = (new_job_id(), cluster.max_context_tokens);
    let form = app.work(move || JobForm::parse(&body, Uuid::new_v4().as_u128() as u32, context)).await?;
    app.check_base_model(&form.model)?;
    check_file(&app, form.training_file, "training_file").await?;
    if let Some(file) = form.validation_file {
        check_file(&app, file, "validation_file").await?;
    }
    if let Some(promote) = &form.promote {
        check_file(&app, promote.file, "promote.file").await?;
    }
    let settings = serde_json::to_string(&form.choices)
        .map_err(|error| ApiError::internal(format!("the job's settings cannot be written: {error}")))?;
    let request = JobRequest {
        id,
        created_at: unix_seconds(),
        model: form.model,
        model_digest: cluster.model_digest,
        training_file: form.training_file,
        validation_file: form.validation_file,
        suffix: form.suffix,
        metadata: form.metadata,
        settings,
        promote: form.promote,
        owner: app.caller.owner(),
        training_minutes_max: app.caller.key().and_then(|key| key.limits.training_minutes),
    };
    let job = match app.scheduler.call(AdminRequest::CreateJob(Box::new(request))).await? {
        AdminReply::Job(job) => job,
        reply => return Err(unexpected(&reply)),
    };
    let mut response = Json(job_object(&job)).into_response();
    add_warning(response.headers_mut(), &form.unknown);
    Ok(response)
}

/// Refuses a file that is not there, or that is not for training.
async fn check_file(app: &App, id: FileId, param: &str) -> Result<(), ApiError> {
    match get_file(app, id).await? {
        None => Err(ApiError {
            code: Some("file_not_found"),
            ..ApiError::field(param, format!("`{param}` names a file that does not exist: upload it first"))
        }),
        Some(file) if file.purpose != FINE_TUNE => Err(ApiError::field(
            param,
            format!("`{param}` names a file whose purpose is not {FINE_TUNE}: upload it for that"),
        )),
        Some(_) => Ok(()),
    }
}

pub(crate) async fn list_jobs(ForCaller(app): ForCaller, uri: Uri) -> Result<Response, ApiError> {
    let mut query = QueryFields::parse(&uri)?;
    let page = Page { after: query.after(read_job_name)?, limit: query.limit(PAGE_JOBS, PAGE_MAX)? };
    tuning(&app)?;
    app.cluster()?;
    match app.scheduler.call(AdminRequest::ListJobs(page)).await? {
        AdminReply::Jobs(jobs, more) => Ok(page_response(jobs.iter().map(job_object).collect(), more, query)),
        reply => Err(unexpected(&reply)),
    }
}

pub(crate) async fn show_job(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(job_object(&find(&app, &name).await?)))
}

pub(crate) async fn cancel_job(app: ForCaller, name: Path<String>) -> Result<Json<Value>, ApiError> {
    control(app, name, JobAction::Cancel).await
}

pub(crate) async fn pause_job(app: ForCaller, name: Path<String>) -> Result<Json<Value>, ApiError> {
    control(app, name, JobAction::Pause).await
}

pub(crate) async fn resume_job(app: ForCaller, name: Path<String>) -> Result<Json<Value>, ApiError> {
    control(app, name, JobAction::Resume).await
}

async fn control(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
    action: JobAction,
) -> Result<Json<Value>, ApiError> {
    tuning(&app)?;
    let id = job_of_path(&name)?;
    app.cluster()?;
    match called(&app, AdminRequest::ControlJob(id, action), &name).await? {
        AdminReply::Job(job) => Ok(Json(job_object(&job))),
        AdminReply::Done => Ok(Json(job_object(&find(&app, &name).await?))),
        reply => Err(unexpected(&reply)),
    }
}

pub(crate) async fn list_events(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
    uri: Uri,
) -> Result<Response, ApiError> {
    let job = find(&app, &name).await?;
    let id = job.request.id;
    let mut query = QueryFields::parse(&uri)?;
    let after = query.after(|text| read_event_name(text, id))?;
    let limit = query.limit(PAGE_EVENTS, PAGE_MAX)?;
    if query.flag("stream")? {
        return follow::respond(app, job, after);
    }
    match called(&app, AdminRequest::ListEvents(id, Page { after, limit }), &name).await? {
        AdminReply::Events(events, more) => {
            let data = events.iter().map(|event| event_object(&job, event)).collect();
            Ok(page_response(data, more, query))
        }
        reply => Err(unexpected(&reply)),
    }
}

pub(crate) async fn list_checkpoints(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
    uri: Uri,
) -> Result<Response, ApiError> {
    tuning(&app)?;
    let id = job_of_path(&name)?;
    let mut query = QueryFields::parse(&uri)?;
    let after = query.after(|text| read_checkpoint_name(text, id))?;
    let page = Page { after, limit: query.limit(PAGE_CHECKPOINTS, PAGE_MAX)? };
    app.cluster()?;
    match called(&app, AdminRequest::ListCheckpoints(id, page), &name).await? {
        AdminReply::Checkpoints(checkpoints, more) => {
            let data = checkpoints.iter().map(|checkpoint| checkpoint_object(id, checkpoint)).collect();
            Ok(page_response(data, more, query))
        }
        reply => Err(unexpected(&reply)),
    }
}

/// A file of the finished adapter, as PEFT reads it.
pub(crate) async fn adapter_file(
    ForCaller(app): ForCaller,
    Path((name, file)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    if !ADAPTER_FILES.contains(&file.as_str()) {
        let message = format!("an adapter has the files {}", ADAPTER_FILES.join(" and "));
        return Err(ApiError::not_found(message, "file_not_found"));
    }
    let job = find(&app, &name).await?;
    let Some(adapter) = job.adapter else {
        let message = "this job has no finished adapter: wait until it has succeeded";
        return Err(ApiError::not_found(message, "adapter_not_found"));
    };
    let blobs = &tuning(&app)?.blobs;
    let manifest = blobs.get_manifest(adapter.0).await?;
    let missing = || ApiError::not_found("this adapter has no such file", "file_not_found");
    download(blobs, manifest.get(&file).ok_or_else(missing)?.blob, &file).await
}

fn page_response(data: Vec<Value>, has_more: bool, query: QueryFields) -> Response {
    let mut response = Json(list(data, has_more)).into_response();
    add_warning(response.headers_mut(), &query.unknown());
    response
}

async fn find(app: &App, name: &str) -> Result<JobRecord, ApiError> {
    tuning(app)?;
    let id = job_of_path(name)?;
    app.cluster()?;
    get_job(app, id, name).await
}

async fn get_job(app: &App, id: JobId, name: &str) -> Result<JobRecord, ApiError> {
    match called(app, AdminRequest::GetJob(id), name).await? {
        AdminReply::Job(job) => Ok(*job),
        reply => Err(unexpected(&reply)),
    }
}

/// A call about a job; what is not found is the job.
async fn called(app: &App, request: AdminRequest, name: &str) -> Result<AdminReply, ApiError> {
    match app.scheduler.call(request).await {
        Err(CallError::Refused(failure)) if failure.kind == AdminFailureKind::NotFound => {
            Err(no_such_job(name))
        }
        reply => Ok(reply?),
    }
}
