//! Which stages, replicas and standbys: the fewest stages that fit, then replicas, the rest stand by.

use crate::cost::{BATCH, CostModel, Group, StepLoad};
use crate::cut::{Candidate, CutStage, best_balanced_cut};
use crate::error::PlanError;
use crate::explain::does_not_fit;
use crate::layout::{Layout, ReplicaLayout, StageLayout};
use crate::ledger::MemoryLedger;
use crate::overrides::plan_fixed_ranges;
use crate::position::Position;
use crate::request::{DeviceReport, Links, PlanRequest};
use crate::shares::Shares;
use crate::speeds::evened;
use ashlar_vocabulary::{Bytes, HeadSlice, LayerRange, ModelShape, NodeId};

/// Above this many groups only the caller's order is searched, not also every other choice of the last group.
const ROTATIONS_MAX: usize = 8;

/// Plans a layout.
///
/// Devices are taken in the order given (sort them by node for layouts that do not change from run to run); with
/// tensor parallelism, consecutive devices form a stage. Within an order the cut is exact: the fewest stages that fit,
/// then the smallest time of the slowest stage for a decode step of 16 sequences, then the smallest sum. The last stage
/// holds the head, or all stages share it: whichever makes the slowest stages of a decode step and of a chunk of a prompt
/// faster, each counting alike. Every choice of the last group is tried too.
///
/// Devices that were measured as about equally fast count as equal: see [`evened`].
///
/// If any device carries a layer range, ranges alone decide: distinct ranges must tile the model, each must be held by
/// ranks × replicas nodes, and nodes without a range stand by.
///
/// # Errors
/// [`PlanError`], whose messages say what would help.
pub fn plan(
    shape: &ModelShape,
    devices: &[DeviceReport],
    links: &Links,
    request: &PlanRequest,
) -> Result<Layout, PlanError> {
    validate(shape, devices, links, request)?;
    let devices = &evened(devices)[..];
    if devices.iter().any(|device| device.layers.is_some()) {
        return plan_fixed_ranges(shape, devices, links, request);
    }
    let ranks = request.tensor_parallel_size.unwrap_or(1);
    let stages = request.stages.unwrap_or(1);
    if stages > shape.num_layers {
        return Err(PlanError::TooManyStages { stages, layers: shape.num_layers });
    }
    let wanted = request.replicas.unwrap_or(1);
    let needed = stages * ranks * wanted;
    if needed > devices.len() {
        let present = devices.len();
        return Err(PlanError::TooFewNodes {
            stages,
            tensor_parallel_size: ranks,
            replicas: wanted,
            needed,
            present,
        });
    }
    let all: Vec<&DeviceReport> = devices.iter().collect();
    let shares = Shares::new(shape, ranks);
    let planner = Planner::new(&shares, links, request, &all);
    let Some(alone) = planner.replica() else { return Err(does_not_fit(&planner, request.stages)) };
    let most = devices.len() / (ranks * alone.stages.len());
    let most = request.replicas.map_or(most, |replicas| replicas.min(most));
    let replicas = (2..=most).rev().find_map(|count| replicate(&planner, count)).unwrap_or(vec![alone]);
    if let Some(wanted) = request.replicas.filter(|&wanted| wanted > replicas.len()) {
        return Err(PlanError::TooFewReplicas { wanted, possible: replicas.len() });
    }
    Ok(finish(ranks, replicas, devices))
}

/// The nodes of `layout` without any one of which a full replica would still be possible on the others.
pub fn survivable_losses(
    shape: &ModelShape,
    devices: &[DeviceReport],
    links: &Links,
    request: &PlanRequest,
    layout: &Layout,
) -> Vec<NodeId> {
    let request = PlanRequest { replicas: None, stages: None, ..request.clone() };
    let survives = |node: &NodeId| {
        let mut rest: Vec<DeviceReport> = devices.iter().filter(|d| &d.node != node).cloned().collect();
        // A loss is answered by a re-plan, which is free of ranges that no longer tile.
        rest.iter_mut().for_each(|device| device.layers = None);
        plan(shape, &rest, links, &request).is_ok()
    };
    layout.nodes().filter(|node| survives(node)).cloned().collect()
}

/// Appends the standbys: every device that no replica uses, in the order given.
pub(crate) fn finish(ranks: usize, replicas: Vec<ReplicaLayout>, devices: &[DeviceReport]) -> Layout {
    let mut layout = Layout { tensor_parallel_size: ranks, replicas, standbys: Vec::new() };
    let used: Vec<&NodeId> = layout.nodes().collect();
    let standbys = devices.iter().map(|d| &d.node).filter(|node| !used.contains(node)).cloned().collect();
    layout.standbys = standbys;
    layout
}

/// `count` replicas, or `None`: first each replica takes the best of what is left; where that starves a later one, groups
/// are dealt out like cards instead, largest first, to and fro.
fn replicate(planner: &Planner<'_>, count: usize) -> Option<Vec<ReplicaLayout>> {
    let mut left = planner.clone();
    let greedy: Option<Vec<ReplicaLayout>> = (0..count)
        .map(|_| {
            let replica = left.replica()?;
            left.groups.retain(|group| !replica.nodes().any(|node| *node == group[0].node));
            Some(replica)
        })
        .collect();
    greedy.or_else(|| {
        let memory = |group: &Group<'_>| group.iter().map(|device| device.memory).min();
        let mut order: Vec<usize> = (0..planner.groups.len()).collect();
        order.sort_by_key(|&group| std::cmp::Reverse(memory(&planner.groups[group])));
        let mut hands = vec![Vec::new(); count];
        for (turn, group) in order.into_iter().enumerate() {
            let (round, place) = (turn / count, turn % count);
            hands[if round % 2 == 0 { place } else { count - 1 - place }].push(group);
        }
        hands
            .into_iter()
            .map(|mut hand| {
                hand.sort_unstable();
                let groups = hand.into_iter().map(|group| planner.groups[group].clone()).collect();
                Planner { groups, ..planner.clone() }.replica()
            })
            .collect()
    })
}

fn validate(
    shape: &ModelShape,
    devices: &[DeviceReport],
    links: &Links,
    request: &PlanRequest,
) -> Result<(), PlanError> {
    let invalid = |what: String| Err(PlanError::Invalid(what));
    let positive = |value: f64| value.is_finite() && value > 0.0;
    if devices.is_empty() {
        return Err(PlanError::NoNodes);
    }
    let dimensions = [
        ("num_layers", shape.num_layers),
        ("hidden_size", shape.hidden_size),
        ("num_heads", shape.num_heads),
        ("num_kv_heads", shape.num_kv_heads),
        ("head_dim", shape.head_dim),
        ("vocab_size", shape.vocab_size),
        ("block_tokens", request.block_tokens),
        ("max_context_tokens", request.max_context_tokens),
        ("max_num_batched_tokens", request.max_num_batched_tokens),
        ("stages", request.stages.unwrap_or(1)),
        ("replicas", request.replicas.unwrap_or(1)),
    ];
    if let Some((name, _)) = dimensions.iter().find(|(_, value)| *value == 0) {
        return invalid(format!("{name} is 0, it must be at least 1"));
    }
    if shape.weights.layers.len() != shape.num_layers {
        return invalid(format!(
            "types are known of {} layers, the model has {}",
            shape.weights.layers.len(),
            shape.num_layers
        ));
    }
    for (index, device) in devices.iter().enumerate() {
        if devices[..index].iter().any(|other| other.node == device.node) {
            return invalid(format!("node {} is listed twice: give every node its own name", device.node));
        }
        let speeds = [device.bandwidth_bytes_per_s, device.flops_per_s, device.quantized_flops_per_s];
        if !speeds.into_iter().all(positive) {
            return invalid(format!("node {} reports no positive speed: measure it again", device.node));
        }
    }
    let slow = |round_trip_s: f64, bytes_per_s: f64| !(round_trip_s >= 0.0 && positive(bytes_per_s));
    if slow(links.round_trip_s, links.bytes_per_s)
        || links.pairs.iter().any(|pair| slow(pair.round_trip_s, pair.bytes_per_s))
    {
        return invalid("a link has no positive speed or a negative round trip: measure it again".into());
    }
    tensor_parallel_is_possible(shape, request.tensor_parallel_size.unwrap_or(1))
}

fn tensor_parallel_is_possible(shape: &ModelShape, size: usize) -> Result<(), PlanError> {
    let possible: Vec<String> = [1, 2, 4, 8]
        .into_iter()
        .filter(|size| shape.num_kv_heads.is_multiple_of(*size))
        .map(|size| size.to_string())
        .collect();
    let possible = possible.join(", ");
    if ![1, 2, 4, 8].contains(&size) {
        let reason = format!("an axis has eight parts, this model can be cut over {possible}");
        return Err(PlanError::TensorParallel { size, reason });
    }
    if !shape.num_kv_heads.is_multiple_of(size) {
        let reason = format!(
            "it does not divide the model's {} KV heads, this model can be cut over {possible}",
            shape.num_kv_heads
        );
        return Err(PlanError::TensorParallel { size, reason });
    }
    Ok(())
}

/// Something for every group, kind of position (in the middle, last, first, both) and range of layers: by the range's start,
/// then by its length less one.
pub(crate) struct ByPosition<T>(Vec<[Vec<Vec<T>>; 4]>);

impl<T: Copy> ByPosition<T> {
    pub(crate) fn of(&self, candidate: Candidate) -> T {
        let position = 2 * usize::from(candidate.before.is_none()) + usize::from(candidate.last);
        let LayerRange { start, end } = candidate.layers;
        self.0[candidate.group][position][start][end - start - 1]
    }
}

/// Plans single replicas over groups of devices.
#[derive(Clone)]
pub(crate) struct Planner<'a> {
    pub(crate) shape: &'a ModelShape,
    pub(crate) request: &'a PlanRequest,
    pub(crate) cost: CostModel<'a>,
    pub(crate) groups: Vec<Group<'a>>,
}

impl<'a> Planner<'a> {
    /// Consecutive devices, as many as there are ranks in `shares`, form a group; what is left over forms none.
    pub(crate) fn new(
        shares: &'a Shares<'a>,
        links: &'a Links,
        request: &'a PlanRequest,
        devices: &[&'a DeviceReport],
    ) -> Planner<'a> {
        let groups = devices.chunks_exact(shares.ranks()).map(<[_]>::to_vec).collect();
        let cost = CostModel { shares, links, request, spread_head: false };
        Planner { shape: shares.shape, request, cost, groups }
    }

    /// The same with another choice for the head.
    pub(crate) fn with_spread_head(&self, spread_head: bool) -> Planner<'a> {
        Planner { cost: CostModel { spread_head, ..self.cost }, ..self.clone() }
    }

    /// The choices for the head of a replica of `stages` stages that the request leaves open.
    pub(crate) fn head_choices(&self, stages: usize) -> Vec<bool> {
        let ranks = self.groups.first().map_or(1, Vec::len);
        match (HeadSlice::can_spread(self.shape, stages, ranks), self.request.spread_head) {
            (false, _) | (true, Some(false)) => vec![false],
            (true, Some(true)) => vec![true],
            (true, None) => vec![false, true],
        }
    }

    /// How slow a cut is, to compare choices for the head: decoding alone would hardly tell them apart, because layers move
    /// to make room for the head, and prompts, which need it for one row only, pay for that.
    pub(crate) fn slowness(&self, cut: &[CutStage]) -> f64 {
        let loads = self.loads(cut);
        let slowest = |load| self.cost.step(&loads, load).into_iter().fold(0.0, f64::max);
        slowest(StepLoad::decode(BATCH, self.request)) * slowest(StepLoad::chunk(self.request))
    }

    fn loads(&self, cut: &[CutStage]) -> Vec<(Group<'a>, LayerRange)> {
        cut.iter().map(|stage| (self.groups[stage.group].clone(), stage.layers)).collect()
    }

    pub(crate) fn position(&self, stage: usize, stages: usize) -> Position {
        Position { stage, stages, spread_head: self.cost.spread_head }
    }

    pub(crate) fn blocks_needed(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.request.block_tokens)
    }

    /// The ledgers of the ranks of `group` with this piece.
    pub(crate) fn ledgers(
        &self,
        group: usize,
        layers: LayerRange,
        position: Position,
        kv_blocks: usize,
    ) -> Vec<MemoryLedger> {
        let group = &self.groups[group];
        let ledger = |(rank, device): (usize, &&DeviceReport)| {
            position.piece(layers, rank, group.len()).ledger(
                self.cost.shares,
                self.request,
                kv_blocks,
                device.memory,
                device.threads,
            )
        };
        group.iter().enumerate().map(ledger).collect()
    }

    /// The best replica over the groups: with the KV cache wished for if any number of stages has room for it, else
    /// with room for at least one longest sequence.
    pub(crate) fn replica(&self) -> Option<ReplicaLayout> {
        let least = self.request.max_context_tokens;
        let wished = self.request.kv_tokens_wanted.max(least);
        self.replica_with(self.blocks_needed(wished)).or_else(|| self.replica_with(self.blocks_needed(least)))
    }

    fn replica_with(&self, kv_blocks: usize) -> Option<ReplicaLayout> {
        let most = self.groups.len().min(self.shape.num_layers);
        let fewest = self.fewest_stages(kv_blocks)?;
        let stages = self.request.stages.map_or(fewest..=most, |stages| stages.max(fewest)..=stages);
        stages.into_iter().find_map(|stages| self.best_head(stages, kv_blocks))
    }

    /// A lower bound on the stages that can hold all layers, from memory alone: as if no stage held the embedding or
    /// the head, and the largest groups came first. Spares the program what cannot fit.
    fn fewest_stages(&self, kv_blocks: usize) -> Option<usize> {
        let layers = self.shape.num_layers;
        let middle = Position { stage: 1, stages: 3, spread_head: false };
        // Layers differ where types are mixed: the lightest range of this length decides.
        let fits = |group: usize, len: usize| {
            let fits = |start| {
                let range = LayerRange { start, end: start + len };
                self.ledgers(group, range, middle, kv_blocks).iter().all(MemoryLedger::fits)
            };
            (0..=layers - len).any(fits)
        };
        let mut room: Vec<usize> = Vec::with_capacity(self.groups.len());
        for group in 0..self.groups.len() {
            let known = room.last().copied().filter(|_| self.equals_the_one_before(group));
            let room_of = || (1..=layers).take_while(|&len| fits(group, len)).count();
            room.push(known.unwrap_or_else(room_of));
        }
        room.sort_unstable_by(|a, b| b.cmp(a));
        let mut sum = 0;
        let enough = room.into_iter().position(|len| {
            sum += len;
            sum >= layers
        });
        enough.map(|index| index + 1)
    }

    /// The best replica of so many stages: with the head where it serves better.
    fn best_head(&self, stages: usize, kv_blocks: usize) -> Option<ReplicaLayout> {
        let choices = self.head_choices(stages).into_iter();
        choices
            .filter_map(|spread| self.with_spread_head(spread).best_order(stages, kv_blocks))
            .map(|(planner, cut)| (planner.slowness(&cut), planner, cut))
            .reduce(|a, b| if b.0 < a.0 { b } else { a })
            .map(|(_, planner, cut)| planner.lay_out(&cut))
    }

    /// The best cut over the caller's order and over the orders in which another group comes last, with that order.
    fn best_order(&self, stages: usize, kv_blocks: usize) -> Option<(Planner<'a>, Vec<CutStage>)> {
        let count = self.groups.len();
        let lasts = if count <= ROTATIONS_MAX { (0..count).rev().collect() } else { vec![count.max(1) - 1] };
        let mut best: Option<((f64, f64), Planner<'a>, Vec<CutStage>)> = None;
        for last in lasts {
            let mut planner = self.clone();
            let group = planner.groups.remove(last);
            planner.groups.push(group);
            if let Some((value, cut)) = planner.cut(stages, kv_blocks)
                && best.as_ref().is_none_or(|(other, ..)| value < *other)
            {
                best = Some((value, planner, cut));
            }
        }
        best.map(|(_, planner, cut)| (planner, cut))
    }

    /// What `price` says of every piece that a group could hold in a replica of `stages` stages, worked out once, for it is
    /// asked for many times.
    pub(crate) fn by_position<T: Copy>(
        &self,
        stages: usize,
        kv_blocks: usize,
        price: impl Fn(usize, LayerRange, Position, &[MemoryLedger]) -> T,
    ) -> ByPosition<T> {
        // Slices of a spread head differ by a granule at most: a stage in the middle is taken to have the widest.
        let ranks = self.groups.first().map_or(1, Vec::len);
        let widest = |stage: &usize| {
            let position = self.position(*stage, stages);
            (0..ranks)
                .map(|rank| position.piece(LayerRange::default(), rank, ranks).head_weights(self.shape))
                .max()
        };
        let last = self.position(stages.max(2) - 1, stages.max(2));
        // Where there are fewer stages, nobody asks for the middle or for both ends.
        let middle = (1..stages.saturating_sub(1)).max_by_key(widest);
        let middle = middle.map_or(last, |stage| self.position(stage, stages));
        let positions = [middle, last, self.position(0, stages.max(2)), self.position(0, 1)];
        let (layers, shares) = (self.shape.num_layers, self.cost.shares);
        let of = |group: usize, position: Position| {
            let of = |range| price(group, range, position, &self.ledgers(group, range, position, kv_blocks));
            let mut by_start: Vec<Vec<T>> = Vec::with_capacity(layers);
            for start in 0..layers {
                let mut by_length: Vec<T> = Vec::with_capacity(layers - start);
                for end in start + 1..=layers {
                    let range = LayerRange { start, end };
                    // Most models' layers are all alike, and the others' nearly so.
                    let known = start
                        .checked_sub(1)
                        .filter(|&before| shares.alike(LayerRange { start: before, end: end - 1 }, range));
                    let known = known.map(|before| by_start[before][by_length.len()]);
                    by_length.push(known.unwrap_or_else(|| of(range)));
                }
                by_start.push(by_length);
            }
            by_start
        };
        ByPosition(
            (0..self.groups.len()).map(|group| positions.map(|position| of(group, position))).collect(),
        )
    }

    /// The exact cut of this order.
    pub(crate) fn cut(&self, stages: usize, kv_blocks: usize) -> Option<((f64, f64), Vec<CutStage>)> {
        let kept = self.enough_groups(stages);
        if kept.len() == self.groups.len() {
            return self.cut_of_all(stages, kv_blocks);
        }
        let groups = kept.iter().map(|&group| self.groups[group].clone()).collect();
        let (value, mut cut) = Planner { groups, ..self.clone() }.cut_of_all(stages, kv_blocks)?;
        cut.iter_mut().for_each(|stage| stage.group = kept[stage.group]);
        Some((value, cut))
    }

    /// The groups that a cut may need: of equal groups beside each other no more than there are stages, for it does not matter
    /// which of them are taken. A thousand equal nodes are thus as soon planned for as a few.
    fn enough_groups(&self, stages: usize) -> Vec<usize> {
        let mut run = 0;
        let kept = |group: &usize| {
            run = if self.equals_the_one_before(*group) { run + 1 } else { 0 };
            run < stages || !self.cost.links.pairs.is_empty()
        };
        (0..self.groups.len()).filter(kept).collect()
    }

    /// Whether a group is as large and as fast as the one before it, rank by rank.
    fn equals_the_one_before(&self, group: usize) -> bool {
        let Some(before) = group.checked_sub(1).and_then(|before| self.groups.get(before)) else {
            return false;
        };
        before.iter().zip(&self.groups[group]).all(|(a, b)| {
            (a.memory, a.threads, a.layers) == (b.memory, b.threads, b.layers)
                && a.bandwidth_bytes_per_s == b.bandwidth_bytes_per_s
                && a.flops_per_s == b.flops_per_s
                && a.quantized_flops_per_s == b.quantized_flops_per_s
        })
    }

    fn cut_of_all(&self, stages: usize, kv_blocks: usize) -> Option<((f64, f64), Vec<CutStage>)> {
        let load = StepLoad::decode(BATCH, self.request);
        let layers = self.shape.num_layers;
        let node = |group: usize| &self.groups[group][0].node;
        // Which ranks will hold the other slices is not known yet: the farthest might.
        let exchange = |group: usize| {
            let others = self.groups.iter().enumerate().filter(|(other, _)| *other != group);
            let nodes = others.flat_map(|(_, other)| other).map(|device| &device.node);
            let ranks = self.groups[group].len();
            self.cost.head_exchange_seconds(node(group), nodes, ((stages - 1) * ranks, stages * ranks), load)
        };
        let prices = self.by_position(stages, kv_blocks, |group, range, position, ledgers| {
            let fits = ledgers.iter().all(MemoryLedger::fits);
            let exchange = if position.spread_head && position.is_last() { exchange(group) } else { 0.0 };
            fits.then(|| exchange + self.cost.stage_seconds(&self.groups[group], range, position, load))
        });
        let hops: Vec<Vec<f64>> = (0..self.groups.len())
            .map(|to| (0..to).map(|from| self.cost.hop_seconds(node(from), node(to), load)).collect())
            .collect();
        best_balanced_cut(stages, self.groups.len(), layers, |c| {
            let seconds = prices.of(c)?;
            Some(seconds + c.before.map_or(0.0, |before| hops[c.group][before]))
        })
    }

    /// The same stages with boundary logs in their ledgers, if there is anything to keep and all fits.
    fn with_boundary_logs(&self, stages: &[StageLayout], kv_blocks: usize) -> Option<Vec<StageLayout>> {
        let with_log = |(index, stage): (usize, &StageLayout)| {
            let ranks = stage.ranks.len();
            let ledgers = stage.ledgers.iter().enumerate().map(|(rank, ledger)| {
                let piece = self.position(index, stages.len()).piece(stage.layers, rank, ranks);
                let (tokens, rows) =
                    (kv_blocks * self.request.block_tokens, self.request.max_num_batched_tokens);
                let row = piece.log_bytes_per_token(self.shape);
                // The rows of a step on their way into it and, on the first stage, which is sent none, out of it.
                let out = if index == 0 { rows * self.shape.hidden_size * size_of::<f32>() } else { 0 };
                let log = Bytes(((tokens + rows) * row + out) as u64);
                Some(ledger.with_boundary_log(log)).filter(MemoryLedger::fits)
            });
            Some(StageLayout { ledgers: ledgers.collect::<Option<_>>()?, ..stage.clone() })
        };
        if stages.len() < 2 { None } else { stages.iter().enumerate().map(with_log).collect() }
    }

    /// Fills in nodes, ledgers and the prediction of a cut that fits, with as many KV blocks as are wished for and fit.
    pub(crate) fn lay_out(&self, cut: &[CutStage]) -> ReplicaLayout {
        let ledgers = |index: usize, kv_blocks: usize| {
            let position = self.position(index, cut.len());
            self.ledgers(cut[index].group, cut[index].layers, position, kv_blocks)
        };
        let wished =
            self.blocks_needed(self.request.kv_tokens_wanted.max(self.request.max_context_tokens)) as u64;
        let room = (0..cut.len()).flat_map(|index| {
            let one = ledgers(index, 1);
            ledgers(index, 0)
                .into_iter()
                .zip(one)
                .map(|(none, one)| none.free.0 / (one.total - none.total).0.max(1))
                .collect::<Vec<_>>()
        });
        let kv_blocks = room.fold(wished, u64::min).min(u64::from(u32::MAX));
        let stages = (0..cut.len()).map(|index| StageLayout {
            layers: cut[index].layers,
            ranks: self.groups[cut[index].group].iter().map(|device| device.node.clone()).collect(),
            ledgers: ledgers(index, kv_blocks as usize),
        });
        let stages: Vec<StageLayout> = stages.collect();
        // It is worth no KV block and no layer: it is kept where there is room left, on every rank that has one.
        let logged =
            self.with_boundary_logs(&stages, kv_blocks as usize).filter(|_| self.request.boundary_log);
        ReplicaLayout {
            boundary_log: logged.is_some(),
            stages: logged.unwrap_or(stages),
            spread_head: self.cost.spread_head,
            kv_blocks: kv_blocks as u32,
            prediction: self.cost.predict(&self.loads(cut)),
        }
    }
}
