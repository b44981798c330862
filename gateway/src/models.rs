//! The models that are deployed beside the scheduler's own one: what this gateway needs to serve them.
//!
//! Each has an [`App`] of its own, which is what handlers see of it: its tokenizer, its name, its part of the cluster, its metrics. The
//! connection to the scheduler is one for all.

use crate::app::App;
use crate::metrics::Metrics;
use crate::openai::error::ApiError;
use crate::text::ModelText;
use ashlar_protocol::models::{ModelStatus, ModelView};
use ashlar_protocol::serving::SchedulerCounters;
use ashlar_vocabulary::ModelDigest;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Finds the files of a model on this machine, by its directory or hub id. Runs where it may take its time.
pub type ModelFinder = Arc<dyn Fn(&str) -> Result<PathBuf, String> + Send + Sync>;

/// Pause before files that could not be read are looked for again.
const RETRY: Duration = Duration::from_secs(5);

/// Deployed models, by name.
pub(crate) type Deployed = BTreeMap<String, DeployedModel>;

/// A deployed model.
#[derive(Debug, Clone)]
pub(crate) struct DeployedModel {
    digest: ModelDigest,
    /// Whether a replica of it has been seen to serve: from then on requests wait for one that is lost.
    has_served: bool,
    text: Text,
}

#[derive(Debug, Clone)]
enum Text {
    Loading,
    Ready(Arc<App>),
    Failed(String, Instant),
}

impl DeployedModel {
    /// What serves it, once its tokenizer is there.
    pub(crate) fn app(&self) -> Option<&Arc<App>> {
        match &self.text {
            Text::Ready(app) => Some(app),
            Text::Loading | Text::Failed(..) => None,
        }
    }
}

/// The model that a request is for, whatever else is in it.
#[derive(Deserialize)]
struct Addressed {
    model: Option<String>,
}

/// What serves the model that a body names: `app` itself, or that of a deployed model.
///
/// # Errors
/// If that cannot be served yet, or not any more.
pub(crate) async fn of_body(app: Arc<App>, body: &bytes::Bytes) -> Result<Arc<App>, ApiError> {
    if app.scheduler.link().models.deployed.is_empty() {
        return Ok(app);
    }
    let body = body.clone();
    let read = move || Ok(serde_json::from_slice::<Addressed>(&body).ok().and_then(|body| body.model));
    // What is wrong with a body is said by whoever reads all of it.
    match app.work(read).await? {
        Some(model) => of_name(app, &model),
        None => Ok(app),
    }
}

fn of_name(app: Arc<App>, model: &str) -> Result<Arc<App>, ApiError> {
    if app.is_base(model) || app.all_adapters().iter().any(|view| view.name == model) {
        return Ok(app);
    }
    let Some(view) = view_of(&app, model) else { return Ok(app) };
    if view.status == ModelStatus::Removing {
        let message = format!("the model `{model}` is being removed");
        return Err(ApiError {
            param: Some("model".to_owned()),
            ..ApiError::not_found(message, "model_not_found")
        });
    }
    let deployed = app.deployed.borrow().get(model).cloned();
    let why = match deployed {
        None => NEW.to_owned(),
        Some(DeployedModel { text: Text::Loading, .. }) => "its tokenizer is being read".to_owned(),
        Some(DeployedModel { text: Text::Failed(reason, _), .. }) => reason,
        Some(DeployedModel { text: Text::Ready(serving), has_served: true, .. }) => {
            return Ok(serving.for_caller(app.caller.clone(), app.quota.clone()));
        }
        Some(_) => view.problem.unwrap_or_else(|| "no replica of it is ready yet".to_owned()),
    };
    Err(not_served_yet(model, &why))
}

/// Why a model is not served that nothing more is known of.
pub(crate) const NEW: &str = "it has just been deployed";

pub(crate) fn not_served_yet(model: &str, why: &str) -> ApiError {
    ApiError::unavailable(format!("the model `{model}` is not served yet: {why}"))
}

/// A deployed model as the scheduler describes it.
pub(crate) fn view_of(app: &App, name: &str) -> Option<ModelView> {
    let link = app.scheduler.link();
    let mut visible = link.models.deployed.iter().filter(|view| may_ask(app, view));
    visible.find(|view| view.request.name == name).cloned()
}

/// Names of the deployed models.
pub(crate) fn names(app: &App) -> Vec<String> {
    let link = app.scheduler.link();
    let deployed = link.models.deployed.iter().filter(|view| view.status != ModelStatus::Removing);
    deployed.filter(|view| may_ask(app, view)).map(|view| view.request.name.clone()).collect()
}

/// Whether the caller may ask a deployed model.
pub(crate) fn may_ask(app: &App, view: &ModelView) -> bool {
    app.caller.may_ask(std::slice::from_ref(&view.request.name))
}

/// Keeps up with what the scheduler says is deployed, for as long as it is polled.
pub(crate) async fn follow(app: Arc<App>, publish: watch::Sender<Arc<Deployed>>, find: ModelFinder) {
    let mut follower = Follower { find, loading: JoinSet::new(), counted: BTreeMap::new(), app };
    let mut link = follower.app.scheduler.watch();
    loop {
        follower.look(&publish);
        tokio::select! {
            changed = link.changed() => if changed.is_err() {
                return;
            },
            Some(loaded) = follower.loading.join_next() => {
                if let Ok(loaded) = loaded {
                    follower.loaded(loaded, &publish);
                }
            }
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

struct Follower {
    app: Arc<App>,
    find: ModelFinder,
    loading: JoinSet<Loaded>,
    /// Counters of models as last seen.
    counted: BTreeMap<String, SchedulerCounters>,
}

struct Loaded {
    name: String,
    digest: ModelDigest,
    text: Result<ModelText, String>,
}

impl Follower {
    fn look(&mut self, publish: &watch::Sender<Arc<Deployed>>) {
        let models = self.app.scheduler.link().models;
        let before = publish.borrow().clone();
        let mut deployed = Deployed::new();
        for view in &models.deployed {
            let (name, digest) = (&view.request.name, view.cluster.model_digest);
            let former = before.get(name).filter(|former| former.digest == digest).cloned();
            let mut model = match former {
                Some(former) => former,
                None => {
                    self.load(name, view);
                    DeployedModel { digest, has_served: false, text: Text::Loading }
                }
            };
            if matches!(&model.text, Text::Failed(_, at) if at.elapsed() >= RETRY) {
                self.load(name, view);
                model.text = Text::Loading;
            }
            model.has_served |= view.status == ModelStatus::Serving;
            if let Some(app) = model.app() {
                let now = view.cluster.counters;
                if let Some(last) = self.counted.insert(name.clone(), now) {
                    app.metrics.steps(&last, &now);
                }
            }
            deployed.insert(name.clone(), model);
        }
        self.counted.retain(|name, _| deployed.contains_key(name));
        let same = before.len() == deployed.len()
            && before.iter().zip(&deployed).all(|(before, now)| {
                before.0 == now.0
                    && (before.1.digest, before.1.has_served) == (now.1.digest, now.1.has_served)
                    && std::mem::discriminant(&before.1.text) == std::mem::discriminant(&now.1.text)
            });
        if !same {
            publish.send_replace(Arc::new(deployed));
        }
    }

    fn load(&mut self, name: &str, view: &ModelView) {
        let (find, name, source) = (self.find.clone(), name.to_owned(), view.cluster.model.clone());
        let digest = view.cluster.model_digest;
        self.loading.spawn_blocking(move || {
            let found = find(&source);
            let text = found.and_then(|files| ModelText::load(&files).map_err(|error| error.to_string()));
            Loaded { name, digest, text }
        });
    }

    fn loaded(&mut self, loaded: Loaded, publish: &watch::Sender<Arc<Deployed>>) {
        let Loaded { name, digest, text } = loaded;
        let made = text.and_then(|text| {
            let metrics = Metrics::new(&name).map_err(|error| error.to_string())?;
            Ok(Arc::new(self.app.for_deployed(&name, Arc::new(text), metrics)))
        });
        let text = match made {
            Ok(app) => {
                tracing::info!(model = %name, "the tokenizer of a deployed model is ready");
                Text::Ready(app)
            }
            Err(reason) => {
                tracing::warn!(model = %name, %reason, "a deployed model cannot be served here");
                Text::Failed(format!("this gateway cannot use its files: {reason}"), Instant::now())
            }
        };
        publish.send_modify(|deployed| {
            let mut changed = (**deployed).clone();
            if let Some(model) = changed.get_mut(&name).filter(|model| model.digest == digest) {
                model.text = text;
            }
            *deployed = Arc::new(changed);
        });
    }
}
