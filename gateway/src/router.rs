//! Which path goes where, and the layers around all of them.

use crate::access::Access;
use crate::admin;
use crate::app::App;
use crate::context::{Surroundings, panic_response, with_context};
use crate::openai::adapters::{delete_model, load_adapter, roll_back_adapter, unload_adapter};
use crate::openai::chat::chat_completions;
use crate::openai::completions::completions;
use crate::openai::models::{list_models, show_model};
use crate::openai::responses;
use crate::openai::tokenize::{detokenize, tokenize};
use crate::openai::tuning::{files, jobs};
use crate::pages;
use crate::reference::{self as r, Operation};
use crate::system;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::{MatchedPath, Request};
use axum::http::Method;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, delete, get, post};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;

/// The whole HTTP surface.
pub(crate) fn router(app: Arc<App>, surface: Surface) -> Router {
    let Routes { router, operations } = routes();
    let surroundings = Surroundings { app: app.clone(), routes: Arc::new(Routing::of(&operations)), surface };
    let layers = ServiceBuilder::new()
        .layer(from_fn_with_state(surroundings, with_context))
        .layer(CatchPanicLayer::custom(panic_response))
        // Bodies are limited where they are read, so that the answer is the envelope.
        .layer(DefaultBodyLimit::disable());
    let reference = Bytes::from(r::document(operations.iter().map(|(path, of)| (*path, of))).to_string());
    router
        .route("/openapi.json", get(move || openapi(reference)))
        .fallback(system::unknown_path)
        .method_not_allowed_fallback(system::wrong_method)
        .layer(layers)
        .with_state(app)
}

/// What is to be had at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Surface {
    /// What clients ask for.
    pub(crate) clients: bool,
    /// What operators do, and look at.
    pub(crate) operators: bool,
    /// Metrics.
    pub(crate) metrics: bool,
}

impl Surface {
    /// Whether a request belongs there. How the server is can be asked everywhere.
    pub(crate) fn has(self, access: Access, path: &str) -> bool {
        match (access, path) {
            (Access::Public, "/health" | "/ready") => true,
            (Access::Public, "/") => self.operators,
            (Access::Public, path) if path.starts_with("/dashboard/") => self.operators,
            (Access::Admin, _) => self.operators,
            (Access::Metrics, _) => self.metrics,
            (Access::Public | Access::AnyKey | Access::Inference | Access::Training, _) => self.clients,
        }
    }
}

/// What each route asks of a key.
pub(crate) struct Routing {
    access: HashMap<(&'static str, Method), Access>,
}

impl Routing {
    fn of(operations: &[(&'static str, Operation)]) -> Routing {
        let entry = |(path, operation): &(&'static str, Operation)| {
            ((*path, operation.verb.method()), operation.access)
        };
        Routing { access: operations.iter().map(entry).collect() }
    }

    /// What a request asks for. A path that there is not shows nothing; a method that nobody has described is for those who may do
    /// everything.
    pub(crate) fn access(&self, request: &Request) -> Access {
        let Some(path) = request.extensions().get::<MatchedPath>() else { return Access::Public };
        let method = match *request.method() {
            Method::HEAD => Method::GET,
            ref method => method.clone(),
        };
        let described =
            self.access.iter().find(|((known, verb), _)| *known == path.as_str() && *verb == method);
        described.map_or(Access::Admin, |(_, access)| *access)
    }
}

async fn openapi(reference: Bytes) -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], reference)
}

/// Routes, each with what the reference says of it.
#[derive(Default)]
struct Routes {
    router: Router<Arc<App>>,
    operations: Vec<(&'static str, Operation)>,
}

impl Routes {
    fn add(
        mut self,
        path: &'static str,
        operations: impl IntoIterator<Item = Operation>,
        methods: MethodRouter<Arc<App>>,
    ) -> Routes {
        self.operations.extend(operations.into_iter().map(|operation| (path, operation)));
        self.router = self.router.route(path, methods);
        self
    }
}

fn routes() -> Routes {
    let inference = Routes::default()
        .add("/v1/chat/completions", [r::CREATE_CHAT], post(chat_completions))
        .add("/v1/completions", [r::CREATE_COMPLETION], post(completions))
        .add("/v1/responses", [r::CREATE_RESPONSE], post(responses::create))
        .add(
            "/v1/responses/{id}",
            [r::SHOW_RESPONSE, r::DELETE_RESPONSE],
            get(responses::show).delete(responses::delete),
        )
        .add("/v1/responses/{id}/cancel", [r::CANCEL_RESPONSE], post(responses::cancel))
        .add("/v1/responses/{id}/input_items", [r::RESPONSE_INPUT], get(responses::input_items))
        .add("/v1/responses/{id}/replay", [r::REPLAY_RESPONSE], post(responses::replay::replay))
        .add("/tokenize", [r::TOKENIZE], post(tokenize))
        .add("/detokenize", [r::DETOKENIZE], post(detokenize));
    let models = inference
        .add("/v1/models", [r::LIST_MODELS], get(list_models))
        .add("/v1/models/{*id}", [r::SHOW_MODEL, r::DELETE_MODEL], get(show_model).delete(delete_model))
        .add("/v1/load_lora_adapter", [r::LOAD_ADAPTER], post(load_adapter))
        .add("/v1/unload_lora_adapter", [r::UNLOAD_ADAPTER], post(unload_adapter))
        .add("/v1/roll_back_lora_adapter", [r::ROLL_BACK_ADAPTER], post(roll_back_adapter))
        .add(
            "/admin/models",
            [r::DEPLOYED_MODELS, r::DEPLOY_MODEL],
            get(admin::models::list).post(admin::models::deploy),
        )
        .add(
            "/admin/models/{name}",
            [r::SHOW_DEPLOYED, r::SCALE_MODEL, r::REMOVE_MODEL],
            get(admin::models::show).patch(admin::models::scale).delete(admin::models::remove),
        );
    let tuning = models
        .add("/v1/files", [r::LIST_FILES, r::UPLOAD_FILE], get(files::list_files).post(files::upload))
        .add(
            "/v1/files/{id}",
            [r::SHOW_FILE, r::DELETE_FILE],
            get(files::show_file).delete(files::delete_file),
        )
        .add("/v1/files/{id}/content", [r::FILE_CONTENT], get(files::file_content))
        .add(
            "/v1/fine_tuning/jobs",
            [r::LIST_JOBS, r::CREATE_JOB],
            get(jobs::list_jobs).post(jobs::create_job),
        )
        .add("/v1/fine_tuning/jobs/{id}", [r::SHOW_JOB], get(jobs::show_job))
        .add("/v1/fine_tuning/jobs/{id}/cancel", [r::CANCEL_JOB], post(jobs::cancel_job))
        .add("/v1/fine_tuning/jobs/{id}/pause", [r::PAUSE_JOB], post(jobs::pause_job))
        .add("/v1/fine_tuning/jobs/{id}/resume", [r::RESUME_JOB], post(jobs::resume_job))
        .add("/v1/fine_tuning/jobs/{id}/events", [r::JOB_EVENTS], get(jobs::list_events))
        .add("/v1/fine_tuning/jobs/{id}/checkpoints", [r::JOB_CHECKPOINTS], get(jobs::list_checkpoints))
        .add("/v1/fine_tuning/jobs/{id}/adapter/{file}", [r::JOB_ADAPTER], get(jobs::adapter_file));
    let cluster = tuning
        .add("/admin/cluster", [r::SHOW_CLUSTER], get(system::cluster))
        .add("/admin/live", [r::SHOW_LIVE], get(admin::observe::live))
        .add("/admin/requests", [r::LIST_REQUESTS], get(admin::observe::requests))
        .add("/admin/requests/{id}", [r::SHOW_REQUEST], get(admin::observe::request))
        .add(
            "/admin/nodes/{node}/drain",
            [r::DRAIN_NODE, r::UNDRAIN_NODE],
            post(admin::drain).delete(admin::undrain),
        )
        .add("/admin/plan", [r::PLAN], post(admin::plan))
        .add("/admin/replan", [r::REPLAN], post(admin::replan))
        .add("/admin/keys", [r::LIST_KEYS, r::CREATE_KEY], get(admin::keys::list).post(admin::keys::create))
        .add("/admin/keys/{id}", [r::REVOKE_KEY], delete(admin::keys::revoke));
    let mut routes = cluster
        .add("/health", [r::HEALTH], get(system::health))
        .add("/ready", [r::READY], get(system::ready))
        .add("/metrics", [r::METRICS], get(system::metrics))
        .add("/", [r::DASHBOARD], get(pages::dashboard))
        .add("/dashboard/{file}", [r::ASSET], get(pages::dashboard_file))
        .add("/docs", [r::DOCS], get(pages::reference))
        .add("/docs/{file}", [r::DOCS_ASSET], get(pages::reference_file));
    // It holds all of the above, and so is routed last.
    routes.operations.push(("/openapi.json", r::OPENAPI));
    routes
}
