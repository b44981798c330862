//! Which path goes where, and the layers around all of them.

use crate::admin;
use crate::app::App;
use crate::context::{panic_response, with_context};
use crate::openai::adapters::{delete_model, load_adapter, roll_back_adapter, unload_adapter};
use crate::openai::chat::chat_completions;
use crate::openai::completions::completions;
use crate::openai::models::{list_models, show_model};
use crate::openai::responses;
use crate::openai::tokenize::{detokenize, tokenize};
use crate::openai::tuning::{files, jobs};
use crate::system;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use std::sync::Arc;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;

/// The whole HTTP surface.
pub(crate) fn router(app: Arc<App>) -> Router {
    let layers = ServiceBuilder::new()
        .layer(from_fn_with_state(app.clone(), with_context))
        .layer(CatchPanicLayer::custom(panic_response))
        // Bodies are limited where they are read, so that the answer is the envelope.
        .layer(DefaultBodyLimit::disable());
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::show).delete(responses::delete))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/responses/{id}/replay", post(responses::replay::replay))
        .route("/v1/models", get(list_models))
        .route("/v1/files", get(files::list_files).post(files::upload))
        .route("/v1/files/{id}", get(files::show_file).delete(files::delete_file))
        .route("/v1/files/{id}/content", get(files::file_content))
        .route("/v1/fine_tuning/jobs", get(jobs::list_jobs).post(jobs::create_job))
        .route("/v1/fine_tuning/jobs/{id}", get(jobs::show_job))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(jobs::cancel_job))
        .route("/v1/fine_tuning/jobs/{id}/pause", post(jobs::pause_job))
        .route("/v1/fine_tuning/jobs/{id}/resume", post(jobs::resume_job))
        .route("/v1/fine_tuning/jobs/{id}/events", get(jobs::list_events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(jobs::list_checkpoints))
        .route("/v1/fine_tuning/jobs/{id}/adapter/{file}", get(jobs::adapter_file))
        .route("/v1/models/{*id}", get(show_model).delete(delete_model))
        .route("/v1/load_lora_adapter", post(load_adapter))
        .route("/v1/unload_lora_adapter", post(unload_adapter))
        .route("/v1/roll_back_lora_adapter", post(roll_back_adapter))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/health", get(system::health))
        .route("/ready", get(system::ready))
        .route("/metrics", get(system::metrics))
        .route("/admin/cluster", get(system::cluster))
        .route("/admin/nodes/{node}/drain", post(admin::drain).delete(admin::undrain))
        .route("/admin/models", get(admin::models::list).post(admin::models::deploy))
        .route(
            "/admin/models/{name}",
            get(admin::models::show).patch(admin::models::scale).delete(admin::models::remove),
        )
        .route("/", get(system::index))
        .fallback(system::unknown_path)
        .method_not_allowed_fallback(system::wrong_method)
        .layer(layers)
        .with_state(app)
}
