//! What a job's models and files are called.

use ashlar_protocol::admin::JobRequest;
use ashlar_vocabulary::{FileId, JobId};

/// The organisation in a fine-tuned model's name, where it belongs to nobody.
const ORGANISATION: &str = "ashlar";

/// The job's own name for its model: `ft:BASE:TENANT:SUFFIX:ID`.
pub(super) fn model(request: &JobRequest) -> String {
    let suffix = request.suffix.as_deref().unwrap_or_default();
    let id = request.id.to_string();
    format!("ft:{}:{}:{suffix}:{}", base(request), organisation(request), id.get(..8).unwrap_or(&id))
}

/// The name under which a finished adapter is served. With a promotion that depends on a comparison, jobs of one suffix share it,
/// without an id (`ft:BASE:TENANT:SUFFIX`): each is measured against what the one before has achieved.
pub(super) fn served(request: &JobRequest) -> String {
    match (&request.promote, &request.suffix) {
        (Some(_), Some(suffix)) => format!("ft:{}:{}:{suffix}", base(request), organisation(request)),
        _ => model(request),
    }
}

fn organisation(request: &JobRequest) -> &str {
    request.owner.as_ref().map_or(ORGANISATION, |tenant| &tenant.0)
}

fn base(request: &JobRequest) -> &str {
    request.model.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

/// The name of its state after a step.
pub(super) fn checkpoint(request: &JobRequest, step: u64) -> String {
    format!("{}:ckpt-step-{step}", model(request))
}

/// Where an adapter came from, for the model list.
pub(super) fn root(job: JobId) -> String {
    format!("job {job}")
}

/// The file of a job's results. It follows from the job's name, so that it is made once, whoever makes it.
pub fn results_file(job: JobId) -> FileId {
    let mut hash = blake3::Hasher::new_derive_key("ashlar fine-tuning results");
    hash.update(&job.0.to_le_bytes());
    file_id(&hash)
}

/// A file of a job's state after a step, an adapter's or a model's, by the same rule.
pub fn checkpoint_file(job: JobId, step: u64, name: &str) -> FileId {
    let mut hash = blake3::Hasher::new_derive_key("ashlar fine-tuning checkpoint files");
    hash.update(&job.0.to_le_bytes()).update(&step.to_le_bytes()).update(name.as_bytes());
    file_id(&hash)
}

fn file_id(hash: &blake3::Hasher) -> FileId {
    let mut id = [0; 16];
    hash.finalize_xof().fill(&mut id);
    FileId(u128::from_le_bytes(id))
}
