//! A stage's forward and backward pass over the micro-batches of a training step.
//!
//! The forward pass is the one that serves, with a tape. A block keeps what its backward pass needs, or only its input, from
//! which it is computed again: the bits are the same.

use super::{ForwardError, StageInput, StageModel, Workspace};
use crate::adapter::{AdaptedRows, Adapter, AdapterDropout, AdapterStep, grown, sum_over_group};
use crate::block::{Backward, BackwardWork, BlockTape, Sequences};
use crate::collective::Collective;
use crate::kv::KvCache;
use crate::tensors::{TensorId, Tensors};
use crate::trained::{MissingTensor, TrainedSource};
use ashlar_kernels::{
    BLOCK_TOKENS, CrossEntropyRow, DropoutRow, Kernels, KvLayout, LogSumExp, PackedMatrix, RowContext,
    StridedRows,
};
use ashlar_vocabulary::gradient::loss_rows;
use ashlar_vocabulary::{BlockId, Bytes, HeadSlice, PARTS, TokenId};
use std::ops::Range;
use std::sync::Arc;

/// Whole sequences that go through the stages together.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    sequences: Vec<Range<usize>>,
    tables: Vec<Vec<BlockId>>,
    dropout: Option<BatchDropout>,
}

/// What adapters do not see of a micro-batch that trains.
#[derive(Debug, Clone, PartialEq)]
struct BatchDropout {
    threshold: u32,
    factor: f32,
    rows: Vec<DropoutRow>,
}

impl MicroBatch {
    /// Sequences of these lengths, one behind the other.
    pub fn new(lengths: &[usize]) -> MicroBatch {
        let (mut row, mut block) = (0, 0);
        let (mut sequences, mut tables) = (Vec::new(), Vec::new());
        for &length in lengths {
            sequences.push(row..row + length);
            let blocks = length.div_ceil(BLOCK_TOKENS) as u32;
            tables.push((block..block + blocks).map(BlockId).collect());
            (row, block) = (row + length, block + blocks);
        }
        MicroBatch { sequences, tables, dropout: None }
    }

    /// Has adapters read zeros in the place of a share of their inputs, and the rest divided by what is left of 1, wherever it goes
    /// through a stage to be trained: as PEFT's `lora_dropout`. `keys` has one of each sequence
    /// ([`dropout_key`](ashlar_vocabulary::random::dropout_key)). A share of 0 changes nothing.
    ///
    /// # Panics
    /// If there are not as many keys as sequences, or the share is not from 0 to below 1.
    pub fn with_dropout(mut self, share: f32, keys: &[[u32; 2]]) -> MicroBatch {
        assert_eq!(keys.len(), self.sequences.len(), "a key per sequence");
        assert!((0.0..1.0).contains(&share), "a share from 0 to below 1");
        if share > 0.0 {
            let share = f64::from(share);
            let of_sequence = |(rows, &key): (&Range<usize>, &[u32; 2])| {
                (0..rows.len() as u32).map(move |position| DropoutRow { key, position })
            };
            self.dropout = Some(BatchDropout {
                threshold: (share * 2_f64.powi(32)) as u32,
                factor: (1.0 / (1.0 - share)) as f32,
                rows: self.sequences.iter().zip(keys).flat_map(of_sequence).collect(),
            });
        }
        self
    }

    /// Tokens of all sequences.
    pub fn rows(&self) -> usize {
        self.sequences.last().map_or(0, |sequence| sequence.end)
    }

    /// The rows of each sequence.
    pub fn sequences(&self) -> &[Range<usize>] {
        &self.sequences
    }

    /// KV blocks that it needs.
    fn blocks(&self) -> usize {
        self.tables.iter().map(Vec::len).sum()
    }

    fn contexts(&self) -> Vec<RowContext<'_>> {
        let sequences = self.sequences.iter().zip(&self.tables);
        let rows = sequences.flat_map(|(rows, table)| {
            (0..rows.len()).map(|position| RowContext { position: position as u32, block_table: table })
        });
        rows.collect()
    }
}

/// A row whose next token is to be learnt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetRow {
    /// Which row of the micro-batch.
    pub row: usize,
    /// The token that should follow.
    pub token: TokenId,
    /// How much it counts. A target that counts for nothing is left out of everything.
    pub weight: f32,
}

/// What the head makes of a target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetScore {
    /// ln p(token), in nats, as serving computes it.
    pub logprob: f32,
    /// Whether it was the most probable token.
    pub best: bool,
}

/// A sum in units of 2⁻³²: exact, so that nothing depends on the order in which rows, micro-batches and replicas come.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ExactSum(pub i64);

impl ExactSum {
    const UNIT: f64 = 1.0 / (1u64 << 32) as f64;

    /// Adds a term, rounded to a unit; nothing for what is no number.
    pub fn add(&mut self, term: f64) {
        self.0 = self.0.saturating_add((term / ExactSum::UNIT).round_ties_even() as i64);
    }

    /// The sum.
    pub fn value(self) -> f64 {
        self.0 as f64 * ExactSum::UNIT
    }
}

/// What a micro-batch lost.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct BatchLoss {
    /// Σ weight · −ln p(token), in nats; of preferences the sum of the pairs' losses.
    pub loss: ExactSum,
    /// Σ weight; of preferences the number of pairs.
    pub weight: ExactSum,
    /// Targets that were the most probable token; of preferences pairs in which the preferred answer has gained on the other.
    pub correct: usize,
    /// Targets, or pairs.
    pub judged: usize,
    /// Targets whose loss is no number: the step must not be taken.
    pub not_finite: usize,
    /// Of preferences: sums of the rewards of the preferred answers, and of the others.
    pub rewards: [ExactSum; 2],
}

impl BatchLoss {
    /// Of targets with these scores. A target that counts for nothing is left out.
    pub fn of_targets(targets: &[TargetRow], scores: &[TargetScore]) -> BatchLoss {
        let mut sum = BatchLoss::default();
        for (target, score) in targets.iter().zip(scores).filter(|(target, _)| target.weight != 0.0) {
            let loss = -f64::from(target.weight) * f64::from(score.logprob);
            sum.loss.add(loss);
            sum.not_finite += usize::from(!loss.is_finite());
            sum.weight.add(f64::from(target.weight));
            sum.correct += usize::from(score.best);
            sum.judged += 1;
        }
        sum
    }

    /// Both together.
    pub fn and(self, other: BatchLoss) -> BatchLoss {
        let sum = |a: ExactSum, b: ExactSum| ExactSum(a.0.saturating_add(b.0));
        BatchLoss {
            loss: sum(self.loss, other.loss),
            weight: sum(self.weight, other.weight),
            correct: self.correct + other.correct,
            judged: self.judged + other.judged,
            not_finite: self.not_finite + other.not_finite,
            rewards: [0, 1].map(|answer| sum(self.rewards[answer], other.rewards[answer])),
        }
    }

    /// The mean over the targets' weights, or over pairs.
    pub fn mean(self) -> f64 {
        self.loss.value() / self.weight.value()
    }

    /// The share of targets, or of pairs, that were right; NaN of none.
    pub fn accuracy(self) -> f64 {
        self.correct as f64 / self.judged as f64
    }
}

/// What a micro-batch's forward pass left on a stage.
#[derive(Debug)]
pub struct StageTape {
    layers: Vec<BlockTape>,
    kept: bool,
    /// What entered a first stage.
    tokens: Vec<TokenId>,
}

impl StageTape {
    /// Memory that it takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(BlockTape::bytes).sum()
    }
}

/// A stage that trains: the weights that serve, or a copy of its own, and buffers.
#[derive(Debug)]
pub struct StageTrainer {
    model: Arc<StageModel>,
    /// What it computes with: training must not take turns with serving.
    kernels: Arc<Kernels>,
    /// The stage's rows of the head, where serving has spread them over other stages.
    head: Option<(HeadSlice, PackedMatrix)>,
    /// One layer's keys and values at a time: a backward pass has those of its tape.
    cache: KvCache,
    work: Workspace,
    backward: BackwardWork,
    rows_max: usize,
    gradients: Vec<f32>,
    /// Angles of a backward pass, which needs the workspace's for blocks that it computes again.
    back_cos: Vec<f32>,
    back_sin: Vec<f32>,
    /// Rows with targets, before and after the last norm.
    picked: Vec<f32>,
    normed: Vec<f32>,
    /// Their logits, then the gradient by them.
    exchanged: Vec<f32>,
    gathered: Vec<f32>,
    /// Tapes of blocks whose memory the next micro-batch uses again, and whether they were kept whole.
    spare: (bool, Vec<BlockTape>),
    /// The tape of the block that is computed again.
    again: BlockTape,
}

impl StageTrainer {
    /// Buffers for micro-batches of at most `rows_max` tokens, and the kernels to compute with.
    pub fn new(model: Arc<StageModel>, kernels: Arc<Kernels>, rows_max: usize) -> StageTrainer {
        let shape = &model.config.shape;
        let layout =
            KvLayout { kv_heads: model.slice.keys(shape).len() / shape.head_dim, head_dim: shape.head_dim };
        // Every sequence may leave all but one slot of its last block empty.
        let cache = KvCache::new(layout, shape.kv_cache, 1, rows_max);
        // Losses have logits of their own.
        let work = model.workspace_for(&kernels, rows_max, 0);
        StageTrainer {
            model,
            kernels,
            head: None,
            cache,
            work,
            backward: BackwardWork::default(),
            rows_max,
            gradients: Vec::new(),
            back_cos: Vec::new(),
            back_sin: Vec::new(),
            picked: Vec::new(),
            normed: Vec::new(),
            exchanged: Vec::new(),
            gathered: Vec::new(),
            spare: (false, Vec::new()),
            again: BlockTape::default(),
        }
    }

    /// Computes losses with these rows of the head instead of the model's, see [`StageModel::load_stage_head`].
    pub fn with_head(mut self, head: (HeadSlice, PackedMatrix)) -> StageTrainer {
        self.head = Some(head);
        self
    }

    /// Replaces the weights of a private copy (see [`StageModel::of_trained`]) by what they have become.
    ///
    /// # Errors
    /// [`MissingTensor`] where `weights` are those of something else.
    ///
    /// # Panics
    /// If somebody else has the model, too: weights that serve never move.
    pub fn reload(&mut self, weights: &Tensors) -> Result<(), MissingTensor> {
        let Some(model) = Arc::get_mut(&mut self.model) else {
            panic!("only a private copy of the model is replaced");
        };
        model.fill(&TrainedSource { weights, kernels: &self.kernels }, &mut |_, _| {})
    }

    /// Memory of rows of the head that serving does not hold here.
    fn head_bytes(&self) -> usize {
        self.head.as_ref().map_or(0, |(_, head)| head.bytes())
    }

    /// Memory that it holds now beside the model's weights, in bytes: workspaces of both passes and of the loss, those of its
    /// kernels, tapes' memory that waits for the next micro-batch, and its own rows of the head. Of what a thread works in it
    /// counts the most that this can be. Tapes that a caller has ([`StageTape::bytes`]) come on top.
    pub fn held_bytes(&self) -> Bytes {
        let buffers = [
            &self.gradients,
            &self.back_cos,
            &self.back_sin,
            &self.picked,
            &self.normed,
            &self.exchanged,
            &self.gathered,
        ];
        let own: usize = buffers.into_iter().map(|buffer| size_of::<f32>() * buffer.capacity()).sum();
        let tapes: usize = self.spare.1.iter().map(BlockTape::bytes).sum();
        let threads = self.kernels.gradient_bytes()
            + self.kernels.attention_gradient_bytes(self.rows_max, self.model.config.shape.head_dim);
        let held = own
            + self.backward.bytes()
            + tapes
            + self.again.bytes()
            + self.head_bytes()
            + self.kernels.scratch_bytes()
            + threads;
        // What the workspace has asked the kernels for is part of what they hold.
        let asked = size_of::<u32>() * self.work.product_words;
        Bytes((held + self.work.bytes().0 as usize - asked) as u64) + self.cache.bytes()
    }

    /// The stage's weights.
    pub fn model(&self) -> &Arc<StageModel> {
        &self.model
    }

    /// The residual stream after [`StageTrainer::forward`].
    pub fn activations(&self, rows: usize) -> &[f32] {
        self.work.activations(rows)
    }

    /// Runs the stage over a micro-batch. With `keep` its blocks keep what their backward pass needs, otherwise only their
    /// inputs. `beat` is called between layers; its error ends the pass.
    ///
    /// # Panics
    /// If the batch has more rows than this was made for.
    pub fn forward(
        &mut self,
        batch: &MicroBatch,
        input: StageInput<'_>,
        adapter: Option<&Adapter>,
        keep: bool,
        group: &mut dyn Collective,
        beat: &mut dyn FnMut() -> Result<(), ForwardError>,
    ) -> Result<StageTape, ForwardError> {
        assert!(batch.rows() <= self.rows_max && batch.blocks() <= self.cache.blocks());
        let StageTrainer { model, kernels, cache, work, spare, .. } = self;
        if spare.0 != keep {
            // What was kept whole would hold its memory for nothing.
            *spare = (keep, Vec::new());
        }
        let contexts = batch.contexts();
        let size = contexts.len() * model.config.shape.hidden_size;
        let tokens = match input {
            StageInput::Tokens(tokens) => tokens.to_vec(),
            StageInput::Activations(_) => Vec::new(),
        };
        model.enter(kernels, &contexts, input, group, work)?;
        let mut layers = Vec::with_capacity(model.blocks.len());
        let (adapted, dropout) = (adapted(batch, adapter), dropout(batch, model));
        for (layer, block) in model.blocks.iter().enumerate() {
            let mut tape = spare.1.pop().unwrap_or_default();
            tape.clear();
            if !keep {
                tape.keep_input(&work.x[..size]);
            }
            let step = AdapterStep { layer, adapted: &adapted, dropout: dropout.as_ref() };
            let own = keep.then_some(&mut tape);
            block.forward(kernels, &contexts, cache.layer_mut(0), group, &step, own, work)?;
            // The gradient passes this rounding as it is.
            model.leave(kernels, layer, contexts.len(), work);
            layers.push(tape);
            beat()?;
        }
        Ok(StageTape { layers, kept: keep, tokens })
    }

    /// Runs the stage over a micro-batch as [`StageTrainer::forward`] does, with the same bits, and keeps nothing for a backward
    /// pass.
    ///
    /// # Panics
    /// If the batch has more rows than this was made for.
    pub fn forward_only(
        &mut self,
        batch: &MicroBatch,
        input: StageInput<'_>,
        adapter: Option<&Adapter>,
        group: &mut dyn Collective,
        beat: &mut dyn FnMut() -> Result<(), ForwardError>,
    ) -> Result<(), ForwardError> {
        assert!(batch.rows() <= self.rows_max && batch.blocks() <= self.cache.blocks());
        let StageTrainer { model, kernels, cache, work, .. } = self;
        let (contexts, adapted) = (batch.contexts(), adapted(batch, adapter));
        model.enter(kernels, &contexts, input, group, work)?;
        for (layer, block) in model.blocks.iter().enumerate() {
            let step = AdapterStep { layer, adapted: &adapted, dropout: None };
            block.forward(kernels, &contexts, cache.layer_mut(0), group, &step, None, work)?;
            model.leave(kernels, layer, contexts.len(), work);
            beat()?;
        }
        Ok(())
    }

    /// The loss of the micro-batch that went through the stage last, on the last stage, and its gradient times `factor` by the rows
    /// there (rows × hidden). The gradients of the head and of the last norm are added to `sink`, if it has them.
    ///
    /// # Panics
    /// If a target's row does not exist, or this stage has no head of its own.
    pub fn loss(
        &mut self,
        targets: &[TargetRow],
        factor: f32,
        rows: usize,
        sink: Option<&mut Tensors>,
        group: &mut dyn Collective,
    ) -> Result<(BatchLoss, &mut [f32]), ForwardError> {
        // What counts for nothing has no gradient.
        let targets: Vec<TargetRow> = targets.iter().filter(|target| target.weight != 0.0).copied().collect();
        let (scores, gradient) = self.score_with_gradient(&targets, factor, rows, sink, group)?;
        Ok((BatchLoss::of_targets(&targets, &scores), gradient))
    }

    /// What the head makes of targets of the micro-batch that went through the stage last, on the last stage: one score per
    /// target, in their order.
    ///
    /// # Panics
    /// If a target's row does not exist, or this stage has no head of its own.
    pub fn score(
        &mut self,
        targets: &[TargetRow],
        group: &mut dyn Collective,
    ) -> Result<Vec<TargetScore>, ForwardError> {
        self.head_pass(targets, None, None, group)
    }

    /// As [`StageTrainer::score`], and the gradient of Σ weight · −ln p(token), times `factor`, by the rows (rows × hidden). A row
    /// has one target at most. The gradients of the head and of the last norm are added to `sink`, if it has them.
    ///
    /// # Panics
    /// If a target's row does not exist, or this stage has no head of its own.
    pub fn score_with_gradient(
        &mut self,
        targets: &[TargetRow],
        factor: f32,
        rows: usize,
        sink: Option<&mut Tensors>,
        group: &mut dyn Collective,
    ) -> Result<(Vec<TargetScore>, &mut [f32]), ForwardError> {
        let size = rows * self.model.config.shape.hidden_size;
        grown(&mut self.gradients, size).fill(0.0);
        let scores = self.head_pass(targets, Some(factor), sink, group)?;
        Ok((scores, &mut self.gradients[..size]))
    }

    /// Scores of targets; with a factor their rows' gradients are written, too, and what the head's own tensors learn is added.
    fn head_pass(
        &mut self,
        targets: &[TargetRow],
        factor: Option<f32>,
        mut sink: Option<&mut Tensors>,
        group: &mut dyn Collective,
    ) -> Result<Vec<TargetScore>, ForwardError> {
        let StageTrainer {
            model, kernels, head, work, gradients, exchanged, gathered, picked, normed, ..
        } = self;
        let (shape, kernels) = (&model.config.shape, &**kernels);
        let hidden = shape.hidden_size;
        let own = model.slice.head.zip(model.head.as_ref());
        let head = head.as_ref().map(|(cut, head)| (*cut, head)).or(own);
        let (Some((cut, head)), Some(norm)) = (head, &model.head_norm) else {
            panic!("the loss is computed where the head is");
        };
        assert_eq!(cut.of, group.size(), "a head that serving spreads over stages is loaded for training");
        let own = cut.rows(shape);
        let per_rank = PARTS / cut.of;
        let parts = shape.vocab_cut().rank_parts(cut.index, cut.of);
        let mut scores = Vec::with_capacity(targets.len());
        let width = own.len();
        if let Some(target) = targets.iter().find(|target| target.token as usize >= shape.vocab_size) {
            return Err(ForwardError::Token(target.token));
        }
        for targets in targets.chunks(loss_rows(shape.vocab_size, cut.of)) {
            let count = targets.len();
            let x = grown(picked, count * hidden);
            for (to, target) in x.chunks_exact_mut(hidden).zip(targets) {
                to.copy_from_slice(&work.x[target.row * hidden..(target.row + 1) * hidden]);
            }
            let x = &*x;
            let normed = grown(normed, count * hidden);
            kernels.rms_norm(count, hidden, x, norm, model.config.rms_norm_eps, normed);
            let logits = grown(exchanged, count * width);
            kernels.matmul(count, normed, head, &[0..hidden], None, logits);
            // Of every row: the largest logit of this rank, where it is, and the target's.
            let at = |target: &TargetRow| {
                own.contains(&(target.token as usize)).then(|| target.token as usize - own.start)
            };
            let mut facts = vec![f32::NEG_INFINITY; 3 * count];
            for (row, (max, place)) in kernels.largest_of_rows(width, logits).into_iter().enumerate() {
                let place = place.map_or(u32::MAX, |place| (own.start + place) as u32);
                let logit = at(&targets[row]).map_or(0.0, |at| logits[row * width + at]);
                facts[3 * row..][..3].copy_from_slice(&[max, f32::from_bits(place), logit]);
            }
            let facts = exchange(&facts, group)?;
            let of_rank = |rank: usize, row: usize| &facts[(rank * count + row) * 3..][..3];
            let owner = |token: usize| {
                (0..cut.of).find(|&rank| shape.vocab_cut().rank(rank, cut.of).contains(&token)).unwrap_or(0)
            };
            let best = |row: usize| {
                let ranks = (0..cut.of).map(|rank| of_rank(rank, row));
                ranks.fold((f32::NEG_INFINITY, u32::MAX), |best, fact| {
                    if fact[0] > best.0 { (fact[0], fact[1].to_bits()) } else { best }
                })
            };
            let max: Vec<f32> = (0..count).map(|row| best(row).0).collect();
            let sums = exchange(&kernels.exp_sums_of_rows(width, logits, &max, &parts), group)?;
            let mut gradient_rows = Vec::with_capacity(count);
            for (row, (target, max)) in targets.iter().zip(max).enumerate() {
                let mut all = [-0.0; PARTS];
                for (rank, all) in all.chunks_exact_mut(per_rank).enumerate() {
                    all.copy_from_slice(&sums[(rank * count + row) * per_rank..][..per_rank]);
                }
                let of = LogSumExp::from_parts(max, &all);
                let logit = of_rank(owner(target.token as usize), row)[2];
                let (logprob, best) = (of.logprob(logit), best(row).1 == target.token);
                scores.push(TargetScore { logprob, best });
                let factor = factor.unwrap_or(0.0) * target.weight;
                gradient_rows.push(CrossEntropyRow { of, target: at(target), factor });
            }
            if factor.is_none() {
                continue;
            }
            kernels.cross_entropy_gradients(width, logits, &gradient_rows);
            let rows = StridedRows { data: logits, stride: width };
            if let Some(sink) = sink.as_deref_mut().and_then(|sink| sink.get_mut(TensorId::Head)) {
                let normed = StridedRows { data: normed, stride: hidden };
                kernels.weight_gradient(count, (rows, width), (normed, hidden), sink);
            }
            let parts: Vec<_> = parts.iter().map(|part| vec![part.clone()]).collect();
            kernels.input_gradient(count, rows, head, &parts, normed);
            sum_over_group(kernels, normed, group, gathered)?;
            let x = StridedRows { data: x, stride: hidden };
            let eps = model.config.rms_norm_eps;
            if let Some(sink) = sink.as_deref_mut().and_then(|sink| sink.get_mut(TensorId::HeadNorm)) {
                let dy = StridedRows { data: normed, stride: hidden };
                kernels.rms_norm_weight_gradient(count, 1, hidden, x, eps, dy, sink);
            }
            kernels.rms_norm_gradient(count, 1, hidden, x, norm, eps, normed, hidden);
            for (from, target) in normed.chunks_exact(hidden).zip(targets) {
                gradients[target.row * hidden..(target.row + 1) * hidden].copy_from_slice(from);
            }
        }
        Ok(scores)
    }

    /// Runs the stage backwards: `gradient` (rows × hidden) by its outputs becomes that by its inputs, and the gradients of all
    /// tensors that `sink` has are added there: of an adapter, or of the stage's own weights. `tape` is what the forward pass of
    /// the same micro-batch, with the same adapter, left.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &mut self,
        batch: &MicroBatch,
        tape: StageTape,
        adapter: Option<&Adapter>,
        gradient: &mut [f32],
        sink: &mut Tensors,
        group: &mut dyn Collective,
        beat: &mut dyn FnMut() -> Result<(), ForwardError>,
    ) -> Result<(), ForwardError> {
        let StageTrainer { model, kernels, cache, work, backward, back_cos, back_sin, spare, again, .. } =
            self;
        let contexts = batch.contexts();
        model.angles(kernels, &contexts, work);
        let half = contexts.len() * model.config.shape.head_dim / 2;
        let cos = grown(back_cos, half);
        cos.copy_from_slice(&work.cos[..half]);
        let back_sin = grown(back_sin, half);
        back_sin.iter_mut().zip(&work.sin).for_each(|(back, sin)| *back = -sin);
        let (adapted, dropout) = (adapted(batch, adapter), dropout(batch, model));
        let StageTape { layers, kept, tokens } = tape;
        for (layer, own) in layers.into_iter().enumerate().rev() {
            let block = &model.blocks[layer];
            let tape = if kept {
                &own
            } else {
                work.x[..own.input.len()].copy_from_slice(&own.input);
                let step = AdapterStep { layer, adapted: &adapted, dropout: dropout.as_ref() };
                let (cache, own) = (cache.layer_mut(0), Some(&mut *again));
                block.forward(kernels, &contexts, cache, group, &step, own, work)?;
                &*again
            };
            let with = Backward {
                kernels,
                sequences: Sequences { ranges: &batch.sequences, cos, back_sin },
                layer: model.slice.layers.start + layer,
                index: layer,
                adapter,
                dropout: dropout.as_ref(),
                tape,
            };
            block.backward(&with, gradient, sink, group, backward)?;
            if spare.0 == kept {
                spare.1.push(own);
            }
            beat()?;
        }
        if let Some(sink) = sink.get_mut(TensorId::Embedding) {
            let (hidden, own) = (model.config.shape.hidden_size, model.slice.vocabulary(&model.config.shape));
            for (row, &token) in gradient.chunks_exact(hidden).zip(&tokens) {
                if own.contains(&(token as usize)) {
                    let at = (token as usize - own.start) * hidden;
                    kernels.add(&mut sink[at..at + hidden], row);
                }
            }
        }
        Ok(())
    }
}

/// What adapters on a stage's layers do not see of a batch.
fn dropout<'a>(batch: &'a MicroBatch, model: &StageModel) -> Option<AdapterDropout<'a>> {
    let BatchDropout { threshold, factor, rows } = batch.dropout.as_ref()?;
    Some(AdapterDropout::new((*threshold, *factor), rows, &model.config.shape, &model.slice))
}

/// The whole batch under one adapter.
fn adapted<'a>(batch: &MicroBatch, adapter: Option<&'a Adapter>) -> Vec<AdaptedRows<'a>> {
    adapter.map(|adapter| AdaptedRows { rows: 0..batch.rows(), adapter }).into_iter().collect()
}

/// Every rank's values, in rank order.
fn exchange(own: &[f32], group: &mut dyn Collective) -> Result<Vec<f32>, ForwardError> {
    let mut all = vec![0.0; own.len() * group.size()];
    group.all_gather(own, &mut all)?;
    Ok(all)
}
