"""How torch_npu words a failure of HCCL: its own line, CANN's reason, CANN's call stack.

Recorded by users of other projects (hiyouga/LlamaFactory issue 3839, vllm-project/vllm-ascend issues 486 and 1443), and
shortened.
"""

WAITED = """\
RuntimeError: npuSynchronizeDevice:build/CMakeFiles/torch_npu.dir/compiler_depend.ts:479 NPU function error: \
AclrtSynchronizeDeviceWithTimeout, error code is 507048
[ERROR] 2025-06-25-10:45:23 (PID:13075, Device:0, RankID:8) ERR00100 PTA call acl api failed
[Error]: The execution of the internal task times out.
        Rectify the fault based on the error information in the ascend log.
EI0002: [PID: 13075] 2025-06-25-10:45:23.586.187 The wait execution of the Notify register times out. Reason: The \
Notify register has not received the Notify record from remote rank: [unknown].
        Solution: 1. If this error is reported on part of these ranks, check other ranks.
        TraceBack (most recent call last):
        hccl task failed[FUNC:a][FILE:task_info.cc][LINE:1]
        stream sync failed[FUNC:b][FILE:stream.cc][LINE:2]
        synchronize failed[FUNC:c][FILE:api_impl.cc][LINE:3]
        rtDeviceSynchronize execute failed, reason=[task timeout][FUNC:d][FILE:error.cc][LINE:53]
"""
NO_SOCKET = """\
RuntimeError: InnerRunOpApi:torch_npu/csrc/framework/OpParamMaker.cpp:281 OPS function error: HcclAllreduce, \
error code is 6
[ERROR] 2025-04-08-18:07:20 (PID:1292363, Device:1, RankID:1) ERR01100 OPS call acl api failed.
EI0006: [PID: 1292363] 2025-04-08-18:07:20.444.436 Getting socket times out. Reason: Remote Rank did not send the \
data in time. Please check the reason for the rank being stuck
        Solution: 1. Check the rank service processes with other errors or no errors in the cluster.
"""
HCCP = """\
RuntimeError: [ERROR] HCCL error in: torch_npu/csrc/distributed/ProcessGroupHCCL.cpp:64
[ERROR] 2024-05-21-11:57:54 (PID:927000, Device:3, RankID:3) ERR02200 DIST call hccl api failed.
EJ0001: 2024-05-21-11:57:54.167.645 Failed to initialize the HCCP process. Reason: Maybe the last training process is \
running.
        Solution: Wait for 10s after killing the last training process and try again.
        TraceBack (most recent call last):
        Fail to get sq reg virtual addr, deviceId=3, sqId=40.[FUNC:Setup][FILE:stream.cc][LINE:1102]
"""
