//! Gradients of a global batch.
//!
//! A batch is eight consecutive runs of samples, as the job's plan cuts it. Within a run a gradient is one chain over samples, then positions, however
//! they are cut in micro-batches; runs add up in the tree `((r0+r1)+(r2+r3))+((r4+r5)+(r6+r7))`. A replica computes whole
//! runs, so that what replicas exchange are the upper levels of that tree.

use ashlar_kernels::Kernels;
use ashlar_model::{TensorLayout, Tensors};
use std::sync::Arc;

/// A replica's gradients, run by run.
#[derive(Debug)]
pub struct RunTree {
    layout: Arc<TensorLayout>,
    /// Sums of closed subtrees, the widest first, each with the number of runs it covers; `None` has no sample.
    open: Vec<(usize, Option<Tensors>)>,
    /// The run being computed.
    current: Option<Tensors>,
    /// Zeroed gradients to be used again.
    spare: Vec<Tensors>,
}

/// Most sums of its layout that a tree has at a time: three closed subtrees, and the run being computed.
pub const SUMS_MAX: usize = 4;

impl RunTree {
    /// No gradients yet; they will be sums of this layout ([`Trained::sums`](ashlar_model::Trained::sums)).
    pub fn new(layout: Arc<TensorLayout>) -> RunTree {
        RunTree { layout, open: Vec::new(), current: None, spare: Vec::new() }
    }

    /// Where the current run's gradients add up.
    pub fn current(&mut self) -> &mut Tensors {
        let (spare, layout) = (&mut self.spare, &self.layout);
        self.current.get_or_insert_with(|| spare.pop().unwrap_or_else(|| Tensors::zeros(layout)))
    }

    /// Ends the current run; one that was never asked for has no samples.
    pub fn end_run(&mut self, kernels: &Kernels) {
        self.open.push((1, self.current.take()));
        while let [.., (left, _), (right, _)] = self.open[..]
            && left == right
        {
            let last = self.open.pop().and_then(|(_, gradient)| gradient);
            let Some((runs, first)) = self.open.last_mut() else { break };
            *runs *= 2;
            match (first.as_mut(), last) {
                (_, None) => {}
                (None, last) => *first = last,
                (Some(first), Some(last)) => {
                    first.tensors_mut().zip(last.tensors()).for_each(|(to, from)| kernels.add(to, from));
                    self.spare.push(last.reset(&self.layout));
                }
            }
        }
    }

    /// The replica's sum, once its runs have ended; −0 everywhere if none had a sample. Starts the next batch.
    ///
    /// # Panics
    /// If the runs so far are not 1, 2, 4 or 8.
    pub fn take(&mut self) -> Tensors {
        let (Some((_, sum)), []) = (self.open.pop(), &self.open[..]) else {
            panic!("a replica has 1, 2, 4 or 8 runs, and they have ended");
        };
        sum.unwrap_or_else(|| {
            let mut nothing = self.spare.pop().unwrap_or_else(|| Tensors::zeros(&self.layout));
            nothing.tensors_mut().for_each(|tensor| tensor.fill(-0.0));
            nothing
        })
    }

    /// Memory of all gradients that it has, those to be used again included, in bytes.
    pub fn bytes(&self) -> usize {
        let open = self.open.iter().filter_map(|(_, sum)| sum.as_ref());
        open.chain(&self.current).chain(&self.spare).map(Tensors::bytes).sum()
    }

    /// Gives gradients back that are of no use any more.
    pub fn recycle(&mut self, gradient: Tensors) {
        self.spare.push(gradient.reset(&self.layout));
    }
}
