//! How long things take: what the plan's cost model says of a step, bytes over a link, bytes of a slice.

use super::Plan;
use crate::node::number_of;
use crate::process::Message;
use ashlar_protocol::membership::{Assignment, HeldSlice};
use ashlar_shard_node::sequencer::Row;
use ashlar_shard_plan::cost::{CostModel, StageWork, StepLoad};
use ashlar_shard_plan::{DeviceReport, PlanRequest, Position, Shares};

/// What the head and rows of activations on their way to it have per value, in bytes.
const BYTES_PER_VALUE: f64 = 4.0;
/// A rank that holds its slice already still has its links to make.
const READY_US: u64 = 5_000;

/// A rank's times in one layout.
pub(crate) struct Pace {
    stage: StageWork,
    overhead_us: u64,
}

impl Pace {
    /// The times of a rank with this assignment. The ranks of a stage wait for one another, so each takes as long as the slowest.
    pub(crate) fn new(plan: &Plan, assignment: &Assignment) -> Pace {
        let ranks = assignment.tensor_parallel_size as usize;
        let shares = Shares::new(&plan.shape, ranks);
        let request = PlanRequest::default();
        let spread_head = spread_head(assignment);
        let cost = CostModel { shares: &shares, links: &plan.links, request: &request, spread_head };
        let device = |address: &String| number_of(address).and_then(|number| plan.nodes.get(number));
        let group: Vec<&DeviceReport> = assignment.group.iter().filter_map(device).collect();
        let stage = cost.stage_work(&group, assignment.layers, position(assignment));
        Pace { stage, overhead_us: plan.times.step_overhead_us }
    }

    /// Microseconds of a step with these rows.
    pub(crate) fn step_us(&self, rows: &[Row]) -> u64 {
        let tokens = rows.len();
        if tokens == 0 {
            return 10;
        }
        let mut sequences = 0;
        let (mut positions, mut last) = (0, None);
        for row in rows {
            positions += row.position as usize + 1;
            sequences += usize::from(last != Some(row.sequence));
            last = Some(row.sequence);
        }
        let load = StepLoad { tokens, sequences, context: positions / tokens };
        self.overhead_us + (1e6 * self.stage.seconds(load)) as u64
    }
}

fn spread_head(assignment: &Assignment) -> bool {
    assignment.head.is_some_and(|head| head.of > assignment.tensor_parallel_size as usize)
}

fn position(assignment: &Assignment) -> Position {
    let (stage, stages) = (assignment.stage.0 as usize, assignment.num_stages as usize);
    Position { stage, stages, spread_head: spread_head(assignment) }
}

/// The slice that an assignment asks for.
pub(crate) fn slice_of(assignment: &Assignment) -> HeldSlice {
    HeldSlice {
        model_digest: assignment.model_digest,
        layers: assignment.layers,
        tensor_rank: assignment.tensor_rank,
        tensor_parallel_size: assignment.tensor_parallel_size,
        head: assignment.head,
    }
}

/// Microseconds until a rank has the slice of its assignment in memory.
pub(crate) fn load_us(plan: &Plan, assignment: &Assignment, held: Option<&HeldSlice>) -> u64 {
    if held == Some(&slice_of(assignment)) {
        return READY_US;
    }
    let ranks = assignment.tensor_parallel_size as usize;
    let (shares, rank) = (Shares::new(&plan.shape, ranks), assignment.tensor_rank.0 as usize);
    let piece = position(assignment).piece(assignment.layers, rank, ranks);
    READY_US + (1e6 * piece.product_bytes(&shares) as f64 / plan.times.load_bytes_per_s) as u64
}

/// Microseconds that a message is under way.
pub(crate) fn delay_us(plan: &Plan, message: &Message) -> u64 {
    let (shape, links) = (&plan.shape, &plan.links);
    let values = |rows: usize, each: usize| (rows * each) as f64;
    let bytes = match message {
        Message::Activations(sent) => {
            values(sent.rows.len(), shape.hidden_size) * shape.activations.bytes() as f64
        }
        Message::HeadRows(asked) => values(asked.rows.len(), shape.hidden_size) * BYTES_PER_VALUE,
        Message::Logits(logits) => {
            values(logits.slice.len(), shape.vocab_size / logits.of.max(1)) * BYTES_PER_VALUE
        }
        _ => 0.0,
    };
    (1e6 * (links.round_trip_s / 2.0 + bytes / links.bytes_per_s)) as u64
}
