//! Models and adapters.

use super::{
    Answer, Body, Field, Kind, Operation, Parameter, Verb, delete, field, get, in_path, post, required,
};
use crate::access::Access;

const SUBJECT: &str = "Models and adapters";
const COUNT: Kind = Kind::Integer(1, 1024);
const GENERATION: Kind = Kind::Integer(0, 1 << 53);
const NAME: &[Parameter] = &[in_path("name", "The name that it is served under.")];
const MODEL: &str = r#"{"object": "ashlar.model", "name": "small", "model": "/models/small", "status": "serving", "nodes": 2,
    "members": ["node-2", "node-3"], "replicas_ready": 1}"#;
const EXPECTED: Field =
    field("expected_generation", GENERATION, "Refused with 409 where another generation is served.");

pub(crate) const LIST_MODELS: Operation = get(
    SUBJECT,
    "What a request may name as its model",
    Answer::Json(
        r#"{"object": "list", "data": [{"id": "ashlar-demo", "object": "model", "created": 1764000000, "owned_by": "ashlar"}]}"#,
    ),
)
.access(Access::AnyKey);
pub(crate) const SHOW_MODEL: Operation = get(
    SUBJECT,
    "A model or adapter",
    Answer::Json(r#"{"id": "ashlar-demo", "object": "model", "owned_by": "ashlar"}"#),
)
.parameters(&[in_path("id", "Its name.")])
.access(Access::AnyKey);
pub(crate) const DELETE_MODEL: Operation = delete(
    SUBJECT,
    "Serve an adapter no longer",
    Answer::Json(r#"{"id": "ft:…", "object": "model", "deleted": true}"#),
)
.parameters(&[in_path("id", "The adapter's name.")])
.access(Access::Training);
pub(crate) const LOAD_ADAPTER: Operation = post(
    SUBJECT,
    "Serve an adapter from a directory",
    Body::Json(&[&[
        required("lora_name", Kind::Text, "The name that it is served under."),
        required("lora_path", Kind::Text, "Its directory, below the configured one."),
        field(
            "load_inplace",
            Kind::Bool,
            "Whether it may take the place of one of this name, as its next generation.",
        ),
        EXPECTED,
    ]]),
    Answer::Text("Success: LoRA adapter 'x' added successfully."),
);
pub(crate) const UNLOAD_ADAPTER: Operation = post(
    SUBJECT,
    "Serve an adapter no longer",
    Body::Json(&[&[
        required("lora_name", Kind::Text, "Its name."),
        field("lora_int_id", Kind::Integer(0, i64::MAX), "Accepted, and not used."),
        EXPECTED,
    ]]),
    Answer::Text("Success: LoRA adapter 'x' removed successfully."),
)
.details("Requests in flight keep it.");
pub(crate) const ROLL_BACK_ADAPTER: Operation = post(
    SUBJECT,
    "Serve an earlier generation of an adapter again",
    Body::Json(&[&[
        required("lora_name", Kind::Text, "Its name."),
        required("to_generation", GENERATION, "Which generation: it is served as a new one."),
        EXPECTED,
    ]]),
    Answer::Text("Success: LoRA adapter 'x' rolled back to generation 1."),
);
pub(crate) const DEPLOYED_MODELS: Operation = get(
    SUBJECT,
    "The models of the cluster, and their nodes",
    Answer::Json(r#"{"object": "list", "data": []}"#),
);
pub(crate) const DEPLOY_MODEL: Operation = post(
    SUBJECT,
    "Serve one more model",
    Body::Json(&[&[
        required("model", Kind::Text, "A directory, a GGUF file or a hub id."),
        field("name", Kind::Text, "The name that it is served under; default: the last part of `model`."),
        field("nodes", COUNT, "On how many nodes; default: what the layout needs."),
        field("stages", COUNT, "Pipeline stages of a replica."),
        field("tensor_parallel_size", COUNT, "Ranks of a stage."),
        field("replicas", COUNT, "Full copies."),
        field("quantize", Kind::Text, "Quantises the weights while they are loaded: `q4_k_m` for example."),
        field("max_context_tokens", Kind::Integer(2, u32::MAX as i64), "The longest sequence."),
    ]]),
    Answer::Json(MODEL),
);
pub(crate) const SHOW_DEPLOYED: Operation =
    get(SUBJECT, "A model of the cluster", Answer::Json(MODEL)).parameters(NAME);
pub(crate) const SCALE_MODEL: Operation = Operation {
    verb: Verb::Patch,
    ..post(
        SUBJECT,
        "Give a model more nodes, or fewer",
        Body::Json(&[&[required("nodes", COUNT, "How many.")]]),
        Answer::Json(MODEL),
    )
}
.parameters(NAME);
pub(crate) const REMOVE_MODEL: Operation = delete(SUBJECT, "Remove a model", Answer::Json(MODEL))
    .parameters(NAME)
    .details("Requests in progress end first.");
