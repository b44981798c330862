//! The cluster: to look at, and to steer.

use super::{
    Answer, Body, Kind, Operation, Parameter, delete, field, get, in_path, in_query, post, required,
};

const SUBJECT: &str = "Cluster";
const NODE: &[Parameter] = &[in_path("node", "The node's name.")];

pub(crate) const SHOW_CLUSTER: Operation = get(
    SUBJECT,
    "Nodes, replicas, stages, memory, who leads",
    Answer::Json(
        r#"{"connected": true, "ready": true, "problem": null, "models": [], "cluster": {"term": 1, "nodes": [],
        "replicas": [], "adapters": [], "requests": [], "counters": {}}}"#,
    ),
);
pub(crate) const SHOW_LIVE: Operation = get(
    SUBJECT,
    "Latencies of the last minute, throughput by the second",
    Answer::Json(r#"{"now": 1764000000.5, "window_s": 60, "ttft_ms": {"count": 3, "p50": 8.1, "p90": 9.0, "p99": 9.0},
        "itl_ms": {"count": 96, "p50": 2.0, "p90": 2.4, "p99": 3.1}, "e2e_ms": {"count": 3, "p50": 71.0, "p90": 80.2, "p99": 80.2},
        "history": [{"t": 1764000000, "prompt_tokens": 54, "generated_tokens": 96, "requests": 3, "failed": 0}]}"#),
)
.details("Of the gateway that is asked.");
const REQUESTS: &str = r#"{"in_flight": [], "recent": [{"id": "…", "model": "ashlar-demo", "finished": 1764000000.5, "reason": "stop",
    "error": null, "e2e_ms": 71.2, "ttft_ms": 8.1, "receipt": {"prompt_tokens": 18, "cached_tokens": 16, "generated_tokens": 3,
    "queue_ms": 0, "prefill_ms": 7, "decode_ms": 63, "preemptions": 0, "replays": 0, "stages": [{"compute_us": 5100, "wait_us": 0,
    "collective_us": 0, "send_us": 80, "sent_bytes": 10240}]}}]}"#;
pub(crate) const LIST_REQUESTS: Operation =
    get(SUBJECT, "Requests in progress, and the latest that ended, with their latency receipts", Answer::Json(REQUESTS))
        .details("In progress: of the whole cluster, up to 64 of each model. Ended: of the gateway that is asked, up to 100.");
pub(crate) const SHOW_REQUEST: Operation =
    get(SUBJECT, "One request's latency receipt", Answer::Json(REQUESTS))
        .parameters(&[in_path("id", "The id of its answer, or its `x-request-id`.")]);
pub(crate) const DRAIN_NODE: Operation = post(
    SUBJECT,
    "Have others take a node's place",
    Body::None,
    Answer::Json(r#"{"node": "node-1", "leaving": true}"#),
)
.parameters(&[
    in_path("node", "The node's name."),
    in_query("force", Kind::Bool, "Even if nothing can take its place."),
])
.details("Then its machine can be taken away.");
pub(crate) const UNDRAIN_NODE: Operation =
    delete(SUBJECT, "Use a drained node again", Answer::Json(r#"{"node": "node-1", "leaving": false}"#))
        .parameters(NODE);
pub(crate) const PLAN: Operation = post(
    SUBJECT,
    "What would become of the layout without some nodes",
    Body::Json(&[&[field("without", Kind::List(&Kind::Text), "The nodes' names.")]]),
    Answer::Json(r#"{"possible": true, "change": "standbys step in", "problem": null, "replicas": [{"replica": 0, "kv_blocks": 2048,
        "stages": [{"layers": {"start": 0, "end": 2}, "ranks": [{"node": "node-2", "memory_bytes": 107413248}]}]}]}"#),
)
.details("Changes nothing.");

pub(crate) const REPLAN: Operation = post(
    SUBJECT,
    "Lay the model out as it would be planned from nothing now",
    Body::Json(&[&[field("dry_run", Kind::Bool, "Only say what that would be.")]]),
    Answer::Json(r#"{"possible": true, "change": "a new layout", "problem": null, "replicas": [{"replica": 0, "kv_blocks": 2048,
        "stages": [{"layers": {"start": 0, "end": 2}, "ranks": [{"node": "node-2", "memory_bytes": 107413248}]}]}]}"#),
)
.details(
    "After nodes have come, gone or been replaced: the layout by itself changes only where it must, or where another one is a quarter \
     better; this takes one that is a tenth better than what is in memory. What serves goes on until the new slices are in memory; then sequences go on where they were. `nothing` where it is \
     laid out so already. The model that the cluster was started with; deployed ones are scaled.",
);

const KEY: &str = r#"{"id": "0123456789abcdef", "object": "key", "name": "notebooks", "tenant": "research", "scopes": ["inference"],
    "models": null, "adapters": null, "requests_per_minute": 60, "tokens_per_minute": null, "concurrency": null,
    "kv_share_percent": null, "training_minutes": null, "priority": 0, "share_prefix_cache": false, "created_at": 1764000000, "expires_at": null,
    "configured": false}"#;
pub(crate) const LIST_KEYS: Operation = get(
    SUBJECT,
    "API keys, without their secrets",
    Answer::Json(r#"{"object": "list", "data": [], "required": true}"#),
);
pub(crate) const CREATE_KEY: Operation = post(
    SUBJECT,
    "Make an API key, which is shown this once",
    Body::Json(&[&[
        required("name", Kind::Text, "What people call it."),
        field(
            "tenant",
            Kind::Text,
            "Whose it is: files, jobs, stored responses and cached prefixes are a tenant's. By default its own.",
        ),
        field(
            "scopes",
            Kind::List(&Kind::OneOf(&["inference", "training", "admin", "metrics"])),
            "What it is good for. By default inference alone.",
        ),
        field("models", Kind::List(&Kind::Text), "The base models that it may ask. By default all."),
        field(
            "adapters",
            Kind::List(&Kind::Text),
            "The adapters that it may use besides its tenant's own. By default all that are nobody's.",
        ),
        field("requests_per_minute", LIMIT, "So many at once, which come back evenly."),
        field(
            "tokens_per_minute",
            LIMIT,
            "Of prompts and answers. What an answer takes beyond it is owed by the next request.",
        ),
        field("concurrency", LIMIT, "Choices in progress at once."),
        field(
            "kv_share_percent",
            Kind::Integer(1, 100),
            "Share of a replica's KV cache that its sequences may hold.",
        ),
        field("training_minutes", LIMIT, "Minutes for which the tenant's jobs may train in all."),
        field(
            "priority",
            Kind::Integer(i32::MIN as i64, i32::MAX as i64),
            "Lower goes first; default 0. A request's own `priority` counts from there, and only downwards.",
        ),
        field(
            "share_prefix_cache",
            Kind::Bool,
            "Whether it finds prefixes that others have computed who share theirs too.",
        ),
        field(
            "expires_in_s",
            Kind::Integer(1, 3_162_240_000),
            "Seconds until it is good for nothing. By default never.",
        ),
    ]]),
    Answer::Json(KEY),
);
const LIMIT: Kind = Kind::Integer(1, u32::MAX as i64);
pub(crate) const REVOKE_KEY: Operation = delete(
    SUBJECT,
    "Let a key in no longer",
    Answer::Json(r#"{"id": "0123456789abcdef", "object": "key", "deleted": true}"#),
)
.parameters(&[in_path("id", "The key's id.")])
.details("Every gateway knows within a second. Answers that have begun go on.");
