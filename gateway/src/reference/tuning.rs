//! Files and fine-tuning jobs.

use super::{
    Answer, Body, Field, Kind, Operation, Parameter, delete, field, get, in_path, in_query, post, required,
};
use crate::access::Access;

const FILES: &str = "Files";
const SUBJECT: &str = "Fine-tuning";

const FILE: &str = r#"{"id": "file-…", "object": "file", "bytes": 1024, "created_at": 1764000000, "filename": "train.jsonl",
    "purpose": "fine-tune", "status": "processed"}"#;
const JOB: &str = r#"{"id": "ftjob-…", "object": "fine_tuning.job", "status": "running", "model": "ashlar-demo",
    "fine_tuned_model": null, "training_file": "file-…", "trained_tokens": null, "error": null}"#;

const AFTER: Parameter =
    in_query("after", Kind::Text, "Only what follows this id in the list, newest first.");
const ORDER: Parameter = in_query("order", Kind::OneOf(&["desc"]), "The newest comes first.");
const LIMIT: Parameter = in_query("limit", Kind::Integer(1, 100), "At most so many.");
const FILE_ID: &[Parameter] = &[in_path("id", "The file: `file-…`.")];
const JOB_ID: &[Parameter] = &[in_path("id", "The job: `ftjob-…`.")];
const JOB_PAGE: &[Parameter] = &[in_path("id", "The job: `ftjob-…`."), AFTER, LIMIT];

const AUTO_OR_COUNT: Kind = Kind::Any(&[Kind::OneOf(&["auto"]), Kind::Integer(1, 4096)]);
const SCHEDULES: Kind = Kind::OneOf(&["constant", "linear", "cosine", "late"]);
const HYPERPARAMETERS: &[Field] = &[
    field("n_epochs", AUTO_OR_COUNT, "How often each example is seen."),
    field("batch_size", AUTO_OR_COUNT, "Examples of a step."),
    field(
        "learning_rate_multiplier",
        Kind::Any(&[Kind::OneOf(&["auto"]), Kind::Number(1e-6, 1e3)]),
        "Times `learning_rate`.",
    ),
    field(
        "beta",
        Kind::Any(&[Kind::OneOf(&["auto"]), Kind::Number(1e-6, 2.0)]),
        "Of DPO: how closely it holds to the reference.",
    ),
];

pub(crate) const JOB_FIELDS: &[Field] = &[
    required("model", Kind::Text, "The base model."),
    required("training_file", Kind::Text, "An uploaded file's id."),
    field("validation_file", Kind::Text, "Another one's: its loss is told, and never trained on."),
    field("suffix", Kind::Text, "Up to 64 letters, digits and ._-: part of the new model's name."),
    field(
        "seed",
        Kind::Integer(0, i32::MAX as i64),
        "The same seed, files and settings give the same adapter, bit for bit.",
    ),
    field("metadata", Kind::Map, "Kept with the job: up to 16 strings."),
    field(
        "method",
        Kind::Object(&[
            required(
                "type",
                Kind::OneOf(&["supervised", "dpo"]),
                "Examples to imitate, or pairs to prefer one of.",
            ),
            field(
                "supervised",
                Kind::Object(&[field("hyperparameters", Kind::Object(HYPERPARAMETERS), "How it trains.")]),
                "For `supervised`.",
            ),
            field(
                "dpo",
                Kind::Object(&[field("hyperparameters", Kind::Object(HYPERPARAMETERS), "How it trains.")]),
                "For `dpo`.",
            ),
        ]),
        "Default: supervised.",
    ),
    field(
        "hyperparameters",
        Kind::Object(HYPERPARAMETERS),
        "OpenAI's older place for them, without `method`.",
    ),
    field(
        "lora",
        Kind::Object(&[
            field("r", Kind::Integer(1, 256), "The rank; default 16."),
            field("alpha", Kind::Number(1e-3, 4096.0), "The scale; default: twice the rank."),
            field("rslora", Kind::Bool, "Scales by the root of the rank instead of the rank."),
            field("dropout", Kind::Number(0.0, 0.9), "Default 0."),
            field(
                "target_modules",
                Kind::Any(&[Kind::OneOf(&["all-linear"]), Kind::List(&Kind::Text)]),
                "Which products are adapted: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`; default: all.",
            ),
        ]),
        "The shape of the adapter.",
    ),
    field("full", Kind::Bool, "Trains all weights instead of an adapter, in a copy of their own."),
    field("init", Kind::OneOf(&["model", "random"]), "Where the weights of `full` begin."),
    field("learning_rate", Kind::Number(1e-9, 1.0), "Of the first step after the warm-up."),
    field("weight_decay", Kind::Number(0.0, 1.0), "AdamW's; default 0."),
    field("grad_clip", Kind::Number(0.0, 1e6), "The largest norm of a gradient; 0: none."),
    field(
        "schedule",
        Kind::Any(&[
            SCHEDULES,
            Kind::Object(&[
                field("type", SCHEDULES, "Default: linear."),
                field(
                    "warmup_ratio",
                    Kind::Number(0.0, 1.0),
                    "Share of the steps in which the rate rises; or `warmup_steps`.",
                ),
                field("warmup_steps", Kind::Integer(0, 1 << 40), "So many steps."),
                field(
                    "decay_ratio",
                    Kind::Number(0.0, 1.0),
                    "Of `late`: share of the steps in which the rate falls; or `decay_steps`.",
                ),
                field("decay_steps", Kind::Integer(0, 1 << 40), "So many steps."),
                field("floor", Kind::Number(0.0, 1.0), "Where it ends, of the highest rate; default 0."),
            ]),
        ]),
        "How the learning rate moves.",
    ),
    field(
        "max_seq_len",
        Kind::Integer(2, u32::MAX as i64),
        "Longer examples are cut off, and the report says so.",
    ),
    field("packing", Kind::Bool, "Several examples in one sequence, that do not see each other."),
    field(
        "early_stopping",
        Kind::Any(&[
            Kind::Bool,
            Kind::Object(&[
                field("patience", Kind::Integer(1, 1000), "Evaluations without a lower loss; default 3."),
                field(
                    "validation_split",
                    Kind::Number(0.0, 1.0),
                    "Share of the examples kept apart where there is no validation file.",
                ),
            ]),
        ]),
        "Ends the job once the validation loss does not fall any more.",
    ),
    field(
        "promote",
        Kind::Object(&[
            required(
                "metric",
                Kind::OneOf(&["exact_match", "loss"]),
                "What is measured: whole answers that are right, or the loss.",
            ),
            field("file", Kind::Text, "An uploaded file to measure on; default: the validation file."),
            field(
                "at_least",
                Kind::Number(0.0, 1.0),
                "Of `exact_match`: the share that it must reach in any case.",
            ),
            field("at_most", Kind::Number(0.0, 1e3), "Of `loss`: what it must not exceed in any case."),
        ]),
        "Serves the adapter only if it is better than what is served.",
    ),
    field("integrations", Kind::List(&Kind::Map), "Not possible: refused unless empty."),
];

pub(crate) const UPLOAD_FILE: Operation = post(
    FILES,
    "Upload examples",
    Body::Multipart(&[
        required(
            "file",
            Kind::File,
            "JSON lines: `messages`, `prompt` and `completion`, `text`, or pairs for DPO.",
        ),
        required("purpose", Kind::OneOf(&["fine-tune"]), "What it is for."),
    ]),
    Answer::Json(FILE),
)
.details("Every line is read when a job begins; the job's report names the lines that are wrong.")
.access(Access::Training);
pub(crate) const LIST_FILES: Operation =
    get(FILES, "Uploaded files", Answer::Json(r#"{"object": "list", "data": [], "has_more": false}"#))
        .parameters(&[AFTER, LIMIT, ORDER])
        .access(Access::Training);
pub(crate) const SHOW_FILE: Operation =
    get(FILES, "A file's record", Answer::Json(FILE)).parameters(FILE_ID).access(Access::Training);
pub(crate) const DELETE_FILE: Operation =
    delete(FILES, "Forget a file", Answer::Json(r#"{"id": "file-…", "object": "file", "deleted": true}"#))
        .parameters(FILE_ID)
        .access(Access::Training);
pub(crate) const FILE_CONTENT: Operation = get(FILES, "A file's bytes", Answer::Bytes)
    .parameters(FILE_ID)
    .details("Also of result files, as `results.csv`.")
    .access(Access::Training);

pub(crate) const CREATE_JOB: Operation = post(
    SUBJECT,
    "Begin a job",
    Body::Json(&[JOB_FIELDS]),
    Answer::Json(JOB),
)
.details("It trains on the shards that serve, beside live traffic, and is served as `ft:…` when it is done.")
.access(Access::Training);
pub(crate) const LIST_JOBS: Operation =
    get(SUBJECT, "Jobs", Answer::Json(r#"{"object": "list", "data": [], "has_more": false}"#))
        .parameters(&[AFTER, LIMIT])
        .access(Access::Training);
pub(crate) const SHOW_JOB: Operation =
    get(SUBJECT, "A job", Answer::Json(JOB)).parameters(JOB_ID).access(Access::Training);
pub(crate) const CANCEL_JOB: Operation = post(SUBJECT, "Stop a job for good", Body::None, Answer::Json(JOB))
    .parameters(JOB_ID)
    .access(Access::Training);
pub(crate) const PAUSE_JOB: Operation =
    post(SUBJECT, "Pause a job", Body::None, Answer::Json(JOB)).parameters(JOB_ID).access(Access::Training);
pub(crate) const RESUME_JOB: Operation =
    post(SUBJECT, "Go on with a paused job", Body::None, Answer::Json(JOB))
        .parameters(JOB_ID)
        .access(Access::Training);
pub(crate) const JOB_EVENTS: Operation = get(
    SUBJECT,
    "What has happened to a job",
    Answer::JsonOrEvents(r#"{"object": "list", "data": [{"id": "ftevent-…", "object": "fine_tuning.job.event", "level": "info",
        "type": "metrics", "message": "Step 1/300: training loss=0.22", "data": {"step": 1, "train_loss": 0.22}}], "has_more": false}"#),
)
.parameters(&[
    in_path("id", "The job: `ftjob-…`."),
    AFTER,
    LIMIT,
    in_query("stream", Kind::Bool, "As server-sent events, from the oldest on, until the job ends."),
])
.access(Access::Training);
pub(crate) const JOB_CHECKPOINTS: Operation =
    get(SUBJECT, "A job's checkpoints", Answer::Json(r#"{"object": "list", "data": [], "has_more": false}"#))
        .parameters(JOB_PAGE)
        .access(Access::Training);
pub(crate) const JOB_ADAPTER: Operation = get(SUBJECT, "A file of the trained adapter", Answer::Bytes)
    .parameters(&[
        in_path("id", "The job: `ftjob-…`."),
        in_path("file", "`adapter_config.json` or `adapter_model.safetensors`, as PEFT reads them."),
    ])
    .access(Access::Training);
