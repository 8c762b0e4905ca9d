"""The contract back end against a real chain: ganache, with a registry compiled by solc, both from the npm registry.

Slow and optional: skipped, saying why, without node, npm or what they download. VPND_TEST_CHAIN names a directory
in which `npm install ganache solc` was run already.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from vpnd import peerid
from vpnd.adapter.contract import ContractRegistry
from vpnd.config.schema import Registry
from vpnd.discovery.contract import RegistryError

PACKAGES = ("ganache@7.9.2", "solc@0.8.30")
INSTALL_S = 100
START_S = 30.0
GAS = hex(3_000_000)

# Shaped like the registry in use: tokens are addresses, and who has one binds a peer id to it
SOURCE = """
// SPDX-License-Identifier: MIT
pragma solidity ^0.8.20;

contract Peers {
    mapping(uint256 => string) private bound;

    function bindPeer(uint256 tokenId, string calldata peerId) external { bound[tokenId] = peerId; }

    function getPeer(uint256 tokenId) external view returns (string memory) {
        require(tokenId != 0, "no such token");
        return bound[tokenId];
    }
}
"""
# evmVersion: the last one ganache has
COMPILE = """
const solc = require('solc');
const input = {language: 'Solidity', sources: {'p.sol': {content: require('fs').readFileSync(0, 'utf8')}},
    settings: {evmVersion: 'paris', outputSelection: {'*': {'*': ['evm']}}}};
const found = JSON.parse(solc.compile(JSON.stringify(input)));
if (!found.contracts) throw new Error(JSON.stringify(found.errors));
const evm = found.contracts['p.sol'].Peers.evm;
console.log(JSON.stringify({code: evm.bytecode.object, methods: evm.methodIdentifiers}));
"""
SERVE = """
const server = require('ganache').server({logging: {quiet: true}, wallet: {deterministic: true}});
server.listen(Number(process.argv[1]), '127.0.0.1').then(() => console.log('ready'));
"""

PEER = peerid.from_public_key(bytes(range(32)))
A = ipaddress.IPv4Address("10.86.0.1")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


class Chain:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.account = self.call("eth_accounts")[0]

    def call(self, method: str, *params: object) -> Any:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        question = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(question, timeout=START_S) as response:
            answer = json.load(response)
        assert "error" not in answer, answer
        return answer["result"]

    def transact(self, **fields: str) -> dict[str, str]:
        sent = self.call("eth_sendTransaction", {"from": self.account, "gas": GAS, **fields})
        receipt = self.call("eth_getTransactionReceipt", sent)
        assert receipt["status"] == "0x1"
        return receipt


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in ("node", "npm"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not there")
    if os.environ.get("VPND_TEST_CHAIN"):
        return Path(os.environ["VPND_TEST_CHAIN"])
    directory = tmp_path_factory.mktemp("chain")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", ".", *PACKAGES]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install took over {INSTALL_S} s")
    if done.returncode:
        pytest.skip(f"npm install failed: {done.stderr.strip()[-300:]}")
    return directory


@pytest.fixture(scope="module")
def chain(modules: Path) -> Iterator[Chain]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        ["node", "-e", SERVE, str(port)],
        cwd=modules,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield Chain(port)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def compiled(modules: Path) -> dict[str, Any]:
    done = subprocess.run(
        ["node", "-e", COMPILE],
        cwd=modules,
        input=SOURCE,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def bind(
    chain: Chain, contract: str, compiled: dict[str, Any], address: ipaddress.IPv4Address, peer: str
) -> None:
    data = peer.encode()
    words = [int(address), 64, len(data)]
    arguments = b"".join(word.to_bytes(32, "big") for word in words) + data + bytes(-len(data) % 32)
    chain.transact(to=contract, data=f"0x{compiled['methods']['bindPeer(uint256,string)']}{arguments.hex()}")


def test_owners_on_a_real_chain(chain: Chain, compiled: dict[str, Any]) -> None:
    contract = chain.transact(data="0x" + compiled["code"])["contractAddress"]
    bind(chain, contract, compiled, A, PEER)
    bind(chain, contract, compiled, A + 1, "not a peer id")

    def registry(contract_address: str) -> ContractRegistry:
        table = Registry(
            kind="contract", rpc_url=chain.url, contract_address=contract_address, negative_lifetime=0.0
        )
        return ContractRegistry(table, lambda name: None, trio.current_time)

    async def ask() -> None:
        owners = registry(contract)
        assert (await owners.owner(A)).peer_id == PEER
        assert (await owners.owner(A + 9)).peer_id == ""
        with pytest.raises(RegistryError, match="'not a peer id', which is not a peer id"):
            await owners.owner(A + 1)
        with pytest.raises(RegistryError, match="no such token"):
            await owners.owner(ipaddress.IPv4Address(0))

        await trio.to_thread.run_sync(bind, chain, contract, compiled, A + 9, PEER)
        assert (await owners.owner(A + 9)).peer_id == PEER
        await trio.to_thread.run_sync(bind, chain, contract, compiled, A, "")
        assert (await owners.owner(A)).peer_id == PEER, "as remembered"
        assert (await owners.ask(A)).peer_id == ""
        await owners.close()

        nothing = registry("0x" + "12" * 20)
        with pytest.raises(RegistryError, match="no contract"):
            await nothing.owner(A)
        await nothing.close()

    trio.run(ask)
