//! The scheduler process: the real director, with the invariants of its engine checked after every input.

use crate::process::{Action, Connection, Input, Message, Purpose, Timer};
use ashlar_protocol::serving::FromScheduler;
use ashlar_scheduler::adapters::AdaptersConfig;
use ashlar_scheduler::cluster::{ClusterConfig, NodeConnection, TICK_MS};
use ashlar_scheduler::director::{Director, Input as DirectorInput, Output};
use ashlar_scheduler::engine::{EngineConfig, GatewayId};
use ashlar_scheduler::jobs::JobsConfig;
use ashlar_scheduler::time::Millis;
use ashlar_vocabulary::{Bytes, LeaseTerm};
use std::collections::BTreeMap;

/// One life of the scheduler: one term.
pub(crate) struct Scheduler {
    pub(crate) director: Director,
    purposes: BTreeMap<Connection, Purpose>,
    /// A node has accepted this term.
    pub(crate) fenced_by: Option<LeaseTerm>,
    /// Times that a replica came up or went down in this life.
    pub(crate) ups: u64,
    pub(crate) downs: u64,
}

impl Scheduler {
    pub(crate) fn new(cluster: ClusterConfig, engine: EngineConfig) -> Scheduler {
        // Nobody asks for a job yet.
        let jobs = JobsConfig {
            term: cluster.term,
            model_digest: cluster.model_digest,
            shape: cluster.shape.clone(),
            adapter_memory: Bytes(1 << 30),
            max_jobs_running: 1,
            blobs: false,
        };
        let director =
            Director::new(cluster, engine, AdaptersConfig { max_adapters: 4, memory: Bytes(1 << 30) }, jobs);
        Scheduler { director, purposes: BTreeMap::new(), fenced_by: None, ups: 0, downs: 0 }
    }

    pub(crate) fn handle(
        &mut self,
        now_us: u64,
        input: Input,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let now = Millis(now_us / 1000);
        let mut outputs = Vec::new();
        let input = match input {
            Input::Timer(Timer::Start | Timer::Tick) => {
                actions.push(Action::Wake { after_us: TICK_MS * 1000, timer: Timer::Tick });
                DirectorInput::Tick
            }
            Input::Opened { connection, purpose, .. } => {
                self.purposes.insert(connection, purpose);
                if purpose == Purpose::Serving {
                    let snapshot = FromScheduler::Cluster(Box::new(self.director.snapshot()));
                    actions.push(Action::Send(connection, Message::FromScheduler(snapshot)));
                }
                return Ok(());
            }
            Input::Message(connection, Message::FromNode(message)) => {
                DirectorInput::Node(NodeConnection(connection.0), Box::new(message))
            }
            Input::Message(connection, Message::ToScheduler(message)) => {
                DirectorInput::Gateway(GatewayId(connection.0), message)
            }
            Input::Closed(connection) => match self.purposes.remove(&connection) {
                Some(Purpose::Control) => {
                    DirectorInput::NodeClosed(NodeConnection(connection.0), "its connection ended".into())
                }
                Some(Purpose::Serving) => DirectorInput::GatewayClosed(GatewayId(connection.0)),
                Some(Purpose::Link(..)) | None => return Ok(()),
            },
            Input::Message(..) | Input::Refused(_) | Input::Timer(_) => {
                return Err("the scheduler received what is not for it".to_owned());
            }
        };
        self.director.handle(now, input, &mut outputs);
        self.director.engine().check().map_err(|why| format!("the engine is inconsistent: {why}"))?;
        self.director.jobs().check().map_err(|why| format!("the jobs are inconsistent: {why}"))?;
        outputs.into_iter().for_each(|output| self.perform(output, actions));
        Ok(())
    }

    fn perform(&mut self, output: Output, actions: &mut Vec<Action>) {
        match output {
            Output::ToNodes(nodes, message) => {
                let send = |node: NodeConnection| {
                    Action::Send(Connection(node.0), Message::ToNode((*message).clone()))
                };
                actions.extend(nodes.into_iter().map(send));
            }
            Output::CloseNode(node, _) => {
                self.purposes.remove(&Connection(node.0));
                actions.push(Action::Close(Connection(node.0)));
            }
            Output::ToGateway(gateway, message) => {
                actions.push(Action::Send(Connection(gateway.0), Message::FromScheduler(*message)));
            }
            Output::Up(_) => self.ups += 1,
            Output::Down(..) => self.downs += 1,
            Output::Problem(_) | Output::Jobs(_) | Output::PersistAdapter(..) | Output::Snapshot => {}
            Output::Fenced(by) => {
                self.fenced_by = self.fenced_by.max(Some(by));
                actions.push(Action::Restart);
            }
        }
    }
}
