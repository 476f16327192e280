/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What the extension must know of Xen's own structures. `cargo xtask extension-table` appends this file to Xen's
 * arch/x86/x86_64/asm-offsets.c, lets Xen's own makefiles compile it to assembly with Xen's own flags, and picks the
 * FERRY lines out of it: the values are those of the very build whose configuration lies beside the source.
 */
#include <xen/event.h>
#include <xen/livepatch.h>
#include <xen/pdx.h>
#include <xen/timer.h>
#include <asm/hvm/svm/vmcb.h>
#include <asm/hvm/vpt.h>
#include <public/event_channel.h>
#include <public/vcpu.h>

/* Private to common/event_fifo.c: laid out as there, in the same version. */
struct ferry_fifo_queue { uint32_t *head; uint32_t tail; uint8_t priority; spinlock_t lock; };
struct ferry_fifo_vcpu {
    struct evtchn_fifo_control_block *control_block;
    struct ferry_fifo_queue queue[EVTCHN_FIFO_MAX_QUEUES];
};
#define FERRY_WORDS (PAGE_SIZE / sizeof(event_word_t))
#define FERRY_PAGES (EVTCHN_FIFO_NR_CHANNELS / FERRY_WORDS)
struct ferry_fifo_domain { event_word_t *event_array[FERRY_PAGES]; unsigned int num_evtchns; };

/* Private to arch/x86/time.c. */
struct ferry_stamp { u64 local_tsc; s_time_t local_stime; s_time_t master_stime; };
struct ferry_cpu_time { struct ferry_stamp stamp; struct time_scale tsc_scale; };
struct ferry_timesource { char *id; char *name; u64 frequency; u64 (*read_counter)(void); };
#define FERRY_READ_TSC_POISON 0x75c75c75c75c75c0ul

#define FERRY(name, value) \
    asm volatile ( "\n.ascii \"FERRY " #name " %0 YRREF\"" :: "i" ((unsigned long)(value)) )
#define FERRY_OFF(name, type, member) FERRY(name, offsetof(type, member))

void __ferry__(void);
void __ferry__(void)
{
    FERRY_OFF(D_ID, struct domain, domain_id);
    FERRY_OFF(D_MAX_VCPUS, struct domain, max_vcpus);
    FERRY_OFF(D_VCPU, struct domain, vcpu);
    FERRY_OFF(D_SHARED_INFO, struct domain, shared_info);
    FERRY_OFF(D_DOMAIN_LOCK, struct domain, domain_lock);
    FERRY_OFF(D_EVTCHN, struct domain, evtchn);
    FERRY_OFF(D_EVTCHN_GROUP, struct domain, evtchn_group);
    FERRY_OFF(D_MAX_PORT, struct domain, max_evtchn_port);
    FERRY_OFF(D_VALID_EVTCHNS, struct domain, valid_evtchns);
    FERRY_OFF(D_ACTIVE_EVTCHNS, struct domain, active_evtchns);
    FERRY_OFF(D_XEN_EVTCHNS, struct domain, xen_evtchns);
    FERRY_OFF(D_EVENT_LOCK, struct domain, event_lock);
    FERRY_OFF(D_PORT_OPS, struct domain, evtchn_port_ops);
    FERRY_OFF(D_FIFO, struct domain, evtchn_fifo);
    FERRY_OFF(D_PIRQ_TREE, struct domain, pirq_tree);
    FERRY_OFF(D_NR_PIRQS, struct domain, nr_pirqs);
    FERRY_OFF(D_OPTIONS, struct domain, options);
    FERRY_OFF(D_IS_DYING, struct domain, is_dying);
    FERRY_OFF(D_PAUSE_COUNT, struct domain, controller_pause_count);
    FERRY_OFF(D_TIME_OFFSET, struct domain, time_offset.seconds);
    FERRY_OFF(D_TIME_OFFSET_SET, struct domain, time_offset.set);
    FERRY_OFF(D_POLL_MASK, struct domain, poll_mask);
    FERRY_OFF(D_SHUTTING_DOWN, struct domain, is_shutting_down);
    FERRY_OFF(D_SHUT_DOWN, struct domain, is_shut_down);
    FERRY_OFF(D_VM_ASSIST, struct domain, vm_assist);
    FERRY_OFF(D_WATCHDOG_LOCK, struct domain, watchdog_lock);
    FERRY_OFF(D_WATCHDOG_MAP, struct domain, watchdog_inuse_map);
    FERRY_OFF(D_WATCHDOG_TIMER, struct domain, watchdog_timer);
    FERRY_OFF(D_32BIT, struct domain, arch.has_32bit_shinfo);
    FERRY_OFF(D_EMULATION, struct domain, arch.emulation_flags);
    FERRY_OFF(D_VTSC, struct domain, arch.vtsc);
    FERRY_OFF(D_VTSC_TO_NS, struct domain, arch.vtsc_to_ns);
    FERRY_OFF(D_PL_TIME, struct domain, arch.hvm.pl_time);
    FERRY_OFF(PL_STIME_OFFSET, struct pl_time, stime_offset);
    FERRY_OFF(PL_LAST_GUEST_TIME, struct pl_time, last_guest_time);
    FERRY(CDF_HVM, XEN_DOMCTL_CDF_hvm);
    FERRY(EMU_USE_PIRQ, X86_EMU_USE_PIRQ);
    FERRY(ASSIST_RUNSTATE_UPDATE, VMASST_TYPE_runstate_update_flag);
    FERRY(NR_VIRQS_, NR_VIRQS);
    FERRY(NR_WATCHDOGS, NR_DOMAIN_WATCHDOG_TIMERS);
    FERRY(VIRQ_ARCH_FIRST, VIRQ_ARCH_0);
    FERRY(POLL_MASK_IS_POINTER, MAX_VIRT_CPUS > BITS_PER_LONG);

    FERRY_OFF(V_ID, struct vcpu, vcpu_id);
    FERRY_OFF(V_PROCESSOR, struct vcpu, processor);
    FERRY_OFF(V_INFO, struct vcpu, vcpu_info);
    FERRY_OFF(V_INFO_MFN, struct vcpu, vcpu_info_mfn);
    FERRY_OFF(V_DOMAIN, struct vcpu, domain);
    FERRY_OFF(V_PERIODIC_LOCK, struct vcpu, periodic_timer_lock);
    FERRY_OFF(V_PERIOD, struct vcpu, periodic_period);
    FERRY_OFF(V_PERIOD_LAST, struct vcpu, periodic_last_event);
    FERRY_OFF(V_PERIODIC, struct vcpu, periodic_timer);
    FERRY_OFF(V_SINGLESHOT, struct vcpu, singleshot_timer);
    FERRY_OFF(V_POLL_TIMER, struct vcpu, poll_timer);
    FERRY_OFF(V_RUNSTATE, struct vcpu, runstate);
    FERRY_OFF(V_RUNSTATE_GUEST, struct vcpu, runstate_guest);
    FERRY_OFF(V_INITIALISED, struct vcpu, is_initialised);
    FERRY_OFF(V_PAUSE_FLAGS, struct vcpu, pause_flags);
    FERRY_OFF(V_VIRQ, struct vcpu, virq_to_evtchn);
    FERRY_OFF(V_POLL_EVTCHN, struct vcpu, poll_evtchn);
    FERRY_OFF(V_PIRQ_HEAD, struct vcpu, pirq_evtchn_head);
    FERRY_OFF(V_FIFO, struct vcpu, evtchn_fifo);
    FERRY_OFF(V_TIME_AREA, struct vcpu, arch.time_info_guest);
    FERRY_OFF(V_UPCALL, struct vcpu, arch.hvm.evtchn_upcall_vector);
    FERRY_OFF(V_HVM_STIME_OFFSET, struct vcpu, arch.hvm.stime_offset);
    FERRY_OFF(V_TSC_OFFSET, struct vcpu, arch.hvm.cache_tsc_offset);
    FERRY_OFF(V_CR2, struct vcpu, arch.hvm.guest_cr[2]);
    FERRY_OFF(V_VMCB, struct vcpu, arch.hvm.svm.vmcb);
    FERRY_OFF(VMCB_CR2, struct vmcb_struct, _cr2);
    FERRY_OFF(RS_STATE, struct vcpu_runstate_info, state);
    FERRY_OFF(RS_ENTRY, struct vcpu_runstate_info, state_entry_time);
    FERRY_OFF(RS_TIME, struct vcpu_runstate_info, time);
    FERRY(RS_SIZE, sizeof(struct vcpu_runstate_info));
    FERRY(VPF_BLOCKED_BIT, _VPF_blocked);
    FERRY(VPF_DOWN_BIT, _VPF_down);

    FERRY_OFF(T_EXPIRES, struct timer, expires);
    FERRY_OFF(T_STATUS, struct timer, status);
    FERRY(T_SIZE, sizeof(struct timer));
    FERRY(T_IN_HEAP, TIMER_STATUS_in_heap);
    FERRY(T_IN_LIST, TIMER_STATUS_in_list);

    FERRY_OFF(E_LOCK, struct evtchn, lock);
    FERRY_OFF(E_STATE, struct evtchn, state);
    FERRY_OFF(E_PORT, struct evtchn, port);
    FERRY_OFF(E_UNBOUND_DOMID, struct evtchn, u.unbound.remote_domid);
    FERRY_OFF(E_REMOTE_PORT, struct evtchn, u.interdomain.remote_port);
    FERRY_OFF(E_REMOTE_DOM, struct evtchn, u.interdomain.remote_dom);
    FERRY_OFF(E_PIRQ, struct evtchn, u.pirq.irq);
    FERRY_OFF(E_PIRQ_NEXT, struct evtchn, u.pirq.next_port);
    FERRY_OFF(E_PIRQ_PREV, struct evtchn, u.pirq.prev_port);
    FERRY_OFF(E_VIRQ, struct evtchn, u.virq);
    FERRY_OFF(E_PENDING, struct evtchn, pending);
    FERRY_OFF(E_PRIORITY, struct evtchn, priority);
    FERRY_OFF(E_NOTIFY, struct evtchn, notify_vcpu_id);
    FERRY_OFF(E_LASTQ, struct evtchn, fifo_lastq);
    FERRY(E_SIZE, sizeof(struct evtchn));
    FERRY(E_PER_BUCKET, EVTCHNS_PER_BUCKET);
    FERRY(E_PER_GROUP, EVTCHNS_PER_GROUP);
    FERRY(E_GROUPS, NR_EVTCHN_GROUPS);
    FERRY(ECS_FREE_, ECS_FREE);
    FERRY(ECS_RESERVED_, ECS_RESERVED);
    FERRY(ECS_UNBOUND_, ECS_UNBOUND);
    FERRY(ECS_INTERDOMAIN_, ECS_INTERDOMAIN);
    FERRY(ECS_PIRQ_, ECS_PIRQ);
    FERRY(ECS_VIRQ_, ECS_VIRQ);
    FERRY(ECS_IPI_, ECS_IPI);

    FERRY_OFF(FD_NUM, struct ferry_fifo_domain, num_evtchns);
    FERRY(FD_PAGES, FERRY_PAGES);
    FERRY(FD_SIZE, sizeof(struct ferry_fifo_domain));
    FERRY_OFF(FV_QUEUE, struct ferry_fifo_vcpu, queue);
    FERRY(FV_SIZE, sizeof(struct ferry_fifo_vcpu));
    FERRY(FQ_SIZE, sizeof(struct ferry_fifo_queue));
    FERRY_OFF(FQ_TAIL, struct ferry_fifo_queue, tail);
    FERRY_OFF(FQ_PRIORITY, struct ferry_fifo_queue, priority);
    FERRY_OFF(FQ_LOCK, struct ferry_fifo_queue, lock);
    FERRY(FIFO_CONTROL_SIZE, sizeof(evtchn_fifo_control_block_t));

    FERRY_OFF(PIRQ_EVTCHN, struct pirq, evtchn);
    FERRY_OFF(PIRQ_EMUIRQ, struct pirq, arch.hvm.emuirq);

    FERRY_OFF(SI_EVTCHN_PENDING, struct shared_info, evtchn_pending);
    FERRY_OFF(SI_EVTCHN_MASK, struct shared_info, evtchn_mask);
    FERRY_OFF(SI_WC_VERSION, struct shared_info, wc_version);
    FERRY_OFF(SI_WC_SEC, struct shared_info, wc_sec);
    FERRY_OFF(SI_WC_NSEC, struct shared_info, wc_nsec);
    FERRY_OFF(SI_WC_SEC_HI, struct shared_info, wc_sec_hi);
    FERRY_OFF(SI32_EVTCHN_PENDING, struct compat_shared_info, evtchn_pending);
    FERRY_OFF(SI32_EVTCHN_MASK, struct compat_shared_info, evtchn_mask);
    FERRY_OFF(SI32_WC_VERSION, struct compat_shared_info, wc_version);
    FERRY_OFF(SI32_WC_SEC, struct compat_shared_info, wc_sec);
    FERRY_OFF(SI32_WC_NSEC, struct compat_shared_info, wc_nsec);
    FERRY_OFF(SI32_WC_SEC_HI, struct compat_shared_info, arch.wc_sec_hi);
    FERRY_OFF(VI_TIME, struct vcpu_info, time);
    FERRY_OFF(VI32_TIME, struct compat_vcpu_info, time);
    FERRY(VI_SIZE, sizeof(struct vcpu_info));
    FERRY(VI_ALIGN, __alignof__(struct vcpu_info));
    FERRY(VI32_ALIGN, __alignof__(struct compat_vcpu_info));
    FERRY(RS32_SIZE, sizeof(struct compat_vcpu_runstate_info));
    FERRY_OFF(RS32_ENTRY, struct compat_vcpu_runstate_info, state_entry_time);
    FERRY_OFF(RS32_TIME, struct compat_vcpu_runstate_info, time);

    FERRY_OFF(CT_LOCAL_TSC, struct ferry_cpu_time, stamp.local_tsc);
    FERRY_OFF(CT_LOCAL_STIME, struct ferry_cpu_time, stamp.local_stime);
    FERRY_OFF(CT_SCALE, struct ferry_cpu_time, tsc_scale);
    FERRY_OFF(TS_SHIFT, struct time_scale, shift);
    FERRY_OFF(TS_MUL, struct time_scale, mul_frac);
    FERRY_OFF(PLT_READ_COUNTER, struct ferry_timesource, read_counter);
    FERRY(READ_TSC_POISON, FERRY_READ_TSC_POISON);
    FERRY_OFF(HF_NAME, struct hvm_function_table, name);
    FERRY_OFF(HF_TSC_SCALING_BITS, struct hvm_function_table, tsc_scaling.ratio_frac_bits);

    FERRY(RW_WRITE_LOCKED, _QW_LOCKED);
    FERRY(RW_WRITE_MASK, _QW_WMASK);
    FERRY(RW_CPU_MASK, _QW_CPUMASK);
    FERRY_OFF(RW_COUNTS, rwlock_t, cnts);
    FERRY(SPINLOCK_SIZE, sizeof(spinlock_t));
    FERRY(SPINLOCK_NO_CPU_, SPINLOCK_NO_CPU);

    FERRY(M2P_BASE, RDWR_MPT_VIRT_START);
    FERRY(STACK_BYTES, STACK_SIZE);
    FERRY(CPUINFO_SIZE, sizeof(struct cpu_info));
    FERRY_OFF(CPUINFO_CURRENT, struct cpu_info, current_vcpu);
    FERRY_OFF(CPUINFO_PROCESSOR, struct cpu_info, processor_id);
    FERRY_OFF(CPUINFO_PERCPU, struct cpu_info, per_cpu_offset);
    FERRY_OFF(DOMCTL_U, struct xen_domctl, u);
    FERRY(DOMCTL_U_SIZE, sizeof(((struct xen_domctl *)0)->u));
    FERRY(LP_FUNC_SIZE, sizeof(struct livepatch_func));
    FERRY_OFF(LP_FUNC_EXPECT, struct livepatch_func, expect);
    FERRY(LP_VERSION, LIVEPATCH_PAYLOAD_VERSION);
}
