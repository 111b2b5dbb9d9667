{{/* The restricted pod security standard, and a file system that only the mounts can be written to. */}}
{{- define "img2img.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  {{- if .Values.fixedUser }}
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  {{- end }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "img2img.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* Takes root, of (the values of the component) and selector: where pods run. */}}
{{- define "img2img.placement" -}}
serviceAccountName: {{ include "img2img.serviceAccountName" .root }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .of.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .of.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- if .of.topologySpreadConstraints }}
  {{- toYaml .of.topologySpreadConstraints | nindent 2 }}
{{- else }}
{{- range .spread }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- $.selector | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end }}
{{- end -}}

{{/* Takes root, component, of and selector: labels and annotations of a pod. */}}
{{- define "img2img.podMetadata" -}}
labels:
  {{- include "img2img.joined" (list .root.Values.commonLabels .of.podLabels (fromYaml .selector)) | nindent 2 }}
annotations:
  checksum/pools: {{ include "img2img.poolsFile" .root | sha256sum }}
  {{- with .of.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Scaling up at once, down late and slowly; takes scaleDownSeconds. */}}
{{- define "img2img.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - {type: Percent, value: 900, periodSeconds: 15}
scaleDown:
  stabilizationWindowSeconds: {{ int .scaleDownSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 60}
{{- end -}}

{{- define "img2img.gatewaySelector" -}}
{{ include "img2img.selector" . }}
app.kubernetes.io/component: gateway
{{- end -}}

{{/* Takes root and pool. */}}
{{- define "img2img.workerSelector" -}}
{{ include "img2img.selector" .root }}
app.kubernetes.io/component: worker
img2img/pool: {{ .pool.name }}
{{- end -}}
