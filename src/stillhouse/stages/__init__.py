"""The stages of a run: what each depends on, and the work that fills its folder.

A function named plan_… takes the job and the finished stages that it reads, and returns a
`StagePlan`; it does nothing yet. `stillhouse.runner` has their order.
"""
